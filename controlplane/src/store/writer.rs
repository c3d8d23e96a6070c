//! The one thread that owns the stores. Others leave it work in bounded queues and wait, if they must,
//! for the answer.
//!
//! State is written change by change and its writers may wait until it is durable. Events are
//! written in batches, and lost (and counted) rather than waited for when the disk is too slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vnet_proto::v1;

use super::{Class, EventQuery, Store, StoreError, Write};
use crate::metrics::Metrics;

/// Work that may wait for the thread.
const QUEUE_MAX: usize = 65_536;
/// Of that, events of what guests do: they never take the room of what is to be kept.
pub(super) const QUEUED_TRAFFIC_MAX: usize = QUEUE_MAX / 2;
/// Events are written at least this often.
const EVENT_DELAY: Duration = Duration::from_millis(200);
/// So many events are written at once.
pub(super) const EVENT_BATCH: usize = 1_000;

/// Ends when the changes that it stands for are durable.
#[derive(Debug)]
pub struct Durable(Option<oneshot::Receiver<Result<(), StoreError>>>);

impl Durable {
    /// Nothing to wait for.
    pub fn already() -> Self {
        Self(None)
    }

    /// Waits.
    ///
    /// # Errors
    /// [`StoreError`]: the changes hold until the process ends, and no longer.
    pub async fn wait(self) -> Result<(), StoreError> {
        match self.0 {
            None => Ok(()),
            Some(done) => done.await.unwrap_or(Err(StoreError::Closed)),
        }
    }
}

/// A handle on the thread.
#[derive(Debug)]
pub struct Writer {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// Events of what guests do that wait in the queue.
    traffic: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

enum Job {
    Write(Vec<Write>, oneshot::Sender<Result<(), StoreError>>),
    Event(Class, Box<v1::Event>),
    Read(Box<dyn FnOnce(&mut Stores) + Send>),
}

struct Stores {
    state: Box<dyn Store>,
    history: Option<Box<dyn Store>>,
}

impl Stores {
    fn history(&mut self) -> &mut dyn Store {
        self.history.as_mut().unwrap_or(&mut self.state).as_mut()
    }
}

impl Writer {
    /// Starts the thread. Without a `history` of its own, events go into `state`. The history is open, and is closed
    /// when the thread ends.
    ///
    /// # Errors
    /// [`StoreError::Open`] if no thread can be had.
    pub fn start(
        state: Box<dyn Store>,
        history: Option<Box<dyn Store>>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        let (jobs, queue) = sync_channel(QUEUE_MAX);
        let traffic = Arc::new(AtomicUsize::new(0));
        let (counted, waiting) = (Arc::clone(&metrics), Arc::clone(&traffic));
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || run(Stores { state, history }, &queue, &waiting, &counted))
            .map_err(|source| StoreError::Open {
                file: "thread".into(),
                source,
            })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            traffic,
            metrics,
        })
    }

    /// Leaves changes to be made, all or none.
    pub fn write(&self, writes: Vec<Write>) -> Durable {
        if writes.is_empty() {
            return Durable::already();
        }
        let (done, wait) = oneshot::channel();
        if let Err(e) = self.send(Job::Write(writes, done)) {
            let job = match e {
                TrySendError::Full(job) => (job, StoreError::Busy),
                TrySendError::Disconnected(job) => (job, StoreError::Closed),
            };
            self.metrics.store_failures.add(1);
            if let (Job::Write(_, done), error) = job {
                // Nobody waiting is as good as somebody told.
                let _ = done.send(Err(error));
            }
        }
        Durable(Some(wait))
    }

    /// Leaves an event to be recorded. If there is no room it is lost, and counted.
    pub fn event(&self, event: v1::Event) {
        let class = Class::of(&event);
        if class == Class::Traffic && self.traffic.fetch_add(1, Ordering::Relaxed) >= QUEUED_TRAFFIC_MAX {
            self.traffic.fetch_sub(1, Ordering::Relaxed);
            self.metrics.events_unrecorded.add(1);
            return;
        }
        if self.send(Job::Event(class, Box::new(event))).is_err() {
            if class == Class::Traffic {
                self.traffic.fetch_sub(1, Ordering::Relaxed);
            }
            self.metrics.events_unrecorded.add(1);
        }
    }

    /// Events from the history, those just left to be recorded included.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn events(&self, query: EventQuery) -> Result<Vec<v1::Event>, StoreError> {
        self.read(move |stores| stores.history().events(&query)).await
    }

    /// One revision of a policy.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn policy(&self, name: String, revision: u64) -> Result<Option<v1::Policy>, StoreError> {
        self.read(move |stores| stores.state.policy(&name, revision))
            .await
    }

    /// Revisions of a policy, newest first, without documents.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn revisions(
        &self,
        name: String,
        before: u64,
        limit: usize,
    ) -> Result<Vec<v1::Policy>, StoreError> {
        self.read(move |stores| stores.state.revisions(&name, before, limit))
            .await
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut Stores) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, wait) = oneshot::channel();
        let job = Job::Read(Box::new(move |stores| {
            let _ = answer.send(read(stores));
        }));
        match self.send(job) {
            Ok(()) => wait.await.unwrap_or(Err(StoreError::Closed)),
            Err(TrySendError::Full(_)) => Err(StoreError::Busy),
            Err(TrySendError::Disconnected(_)) => Err(StoreError::Closed),
        }
    }

    fn send(&self, job: Job) -> Result<(), TrySendError<Job>> {
        match &self.jobs {
            Some(jobs) => jobs.try_send(job),
            None => Err(TrySendError::Disconnected(job)),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The thread ends when it has done what is queued.
        self.jobs.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(mut stores: Stores, queue: &Receiver<Job>, traffic: &AtomicUsize, metrics: &Metrics) {
    let mut batch: Vec<v1::Event> = Vec::new();
    let mut due: Option<Instant> = None;
    loop {
        let job = match due {
            None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => queue.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        let flush = match job {
            Ok(Job::Event(class, event)) => {
                if class == Class::Traffic {
                    traffic.fetch_sub(1, Ordering::Relaxed);
                }
                batch.push(*event);
                due.get_or_insert_with(|| Instant::now() + EVENT_DELAY);
                batch.len() >= EVENT_BATCH
            }
            Ok(Job::Write(writes, done)) => {
                let result = stores.state.apply(&writes);
                if let Err(e) = &result {
                    metrics.store_failures.add(1);
                    tracing::error!(error = %e, cause = cause(e), "state could not be saved");
                }
                let _ = done.send(result);
                false
            }
            Ok(Job::Read(read)) => {
                record(&mut stores, &mut batch, metrics);
                due = None;
                read(&mut stores);
                false
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => {
                record(&mut stores, &mut batch, metrics);
                if let Err(e) = stores.history().close_history() {
                    tracing::error!(error = %e, cause = cause(&e), "the history could not be closed");
                }
                return;
            }
        };
        if flush {
            record(&mut stores, &mut batch, metrics);
            due = None;
        }
    }
}

fn record(stores: &mut Stores, batch: &mut Vec<v1::Event>, metrics: &Metrics) {
    if batch.is_empty() {
        return;
    }
    match stores.history().append_events(batch) {
        Ok(gone) => metrics.events_let_go.add(gone),
        Err(e) => {
            metrics.store_failures.add(1);
            metrics.events_unrecorded.add(batch.len() as u64);
            tracing::error!(error = %e, cause = cause(&e), "events could not be recorded");
        }
    }
    batch.clear();
}

fn cause(error: &StoreError) -> String {
    std::error::Error::source(error)
        .map(ToString::to_string)
        .unwrap_or_default()
}
