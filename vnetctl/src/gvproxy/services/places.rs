//! The connections of one kind of socket, and which of them makes way for another: the one for which nothing has been
//! done for the longest time. One with a request in progress, or whose answer is under way, as a stream of events,
//! goes for nobody; one that has yet to say the rest of its request does.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::Notify;

use super::answer;

/// Tasks for each connection that there may be: those that make way, or are told that there is no place, take a
/// moment.
const TASKS_PER_CONNECTION: usize = 2;

/// The connections of one kind of socket.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    /// By number.
    connections: BTreeMap<u64, Connection>,
    /// Connections, also of those that made way and have not ended yet.
    tasks: usize,
}

#[derive(Debug)]
struct Connection {
    /// Requests in progress.
    requests: usize,
    /// A number that was the next when it came, or its last request was done.
    idle_since: u64,
    make_way: Arc<Notify>,
}

/// A connection's place. Free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    number: u64,
    make_way: Arc<Notify>,
}

/// A request in progress: as long as this is there its connection keeps its place.
#[derive(Debug)]
pub(super) struct Busy {
    places: Arc<Places>,
    number: u64,
    /// Its connection counts it.
    counts: bool,
}

impl Places {
    /// Places for so many.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: Mutex::default(),
        })
    }

    /// A place for one more; where all are taken, the longest idle makes way. `None` where none is idle, and while
    /// those that made way have not ended.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Place> {
        let mut taken = self.lock();
        if taken.tasks >= self.most * TASKS_PER_CONNECTION {
            return None;
        }
        if taken.connections.len() >= self.most {
            let idle = taken.connections.iter().filter(|(_, one)| one.requests == 0);
            let longest = *idle.min_by_key(|(_, one)| one.idle_since)?.0;
            taken.connections.remove(&longest)?.make_way.notify_one();
        }
        taken.tasks += 1;
        let number = taken.count();
        let make_way = Arc::new(Notify::new());
        let connection = Connection {
            requests: 0,
            idle_since: number,
            make_way: Arc::clone(&make_way),
        };
        taken.connections.insert(number, connection);
        Some(Place {
            places: Arc::clone(self),
            number,
            make_way,
        })
    }

    /// Connections with a request in progress.
    #[cfg(test)]
    pub(super) fn busy(&self) -> usize {
        let taken = self.lock();
        taken.connections.values().filter(|one| one.requests > 0).count()
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn count(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Place {
    /// Waits until it is to make way.
    pub(super) async fn made_way(&self) {
        self.make_way.notified().await;
    }

    /// A request begins. `None` where the connection made way before it came.
    pub(super) fn begin(&self) -> Option<Busy> {
        self.places.lock().connections.get_mut(&self.number)?.requests += 1;
        Some(Busy {
            places: Arc::clone(&self.places),
            number: self.number,
            counts: true,
        })
    }
}

impl Busy {
    /// Waits for what the client has yet to say: meanwhile its connection is idle. One that made way says no more, and
    /// this does not end; it is closed.
    pub(super) async fn while_idle<T>(&mut self, what: impl Future<Output = T>) -> T {
        self.pause();
        let done = what.await;
        {
            let mut taken = self.places.lock();
            if let Some(connection) = taken.connections.get_mut(&self.number) {
                connection.requests += 1;
                self.counts = true;
            }
        }
        if !self.counts {
            std::future::pending::<()>().await;
        }
        done
    }

    fn pause(&mut self) {
        if !std::mem::take(&mut self.counts) {
            return;
        }
        let mut taken = self.places.lock();
        let now = taken.count();
        if let Some(connection) = taken.connections.get_mut(&self.number) {
            connection.requests -= 1;
            connection.idle_since = now;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.connections.remove(&self.number);
        taken.tasks -= 1;
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.pause();
    }
}

/// An answer's body, with which its request ends.
pub(super) struct Lasting {
    body: answer::Body,
    _busy: Option<Busy>,
}

impl Lasting {
    pub(super) fn new(body: answer::Body, busy: Option<Busy>) -> Self {
        Self { body, _busy: busy }
    }
}

impl Body for Lasting {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_idle_makes_way_and_none_with_a_request_in_progress() {
        let places = Places::new(2);
        let first = places.enter().unwrap();
        let second = places.enter().unwrap();
        // It was there before, but has done something since.
        drop(first.begin().unwrap());
        let third = places.enter().unwrap();
        second.made_way().await;
        assert!(second.begin().is_none(), "its request came too late");
        let busy = [first.begin().unwrap(), third.begin().unwrap()];
        let twice = first.begin().unwrap();
        assert!(places.enter().is_none(), "none is idle");
        drop(busy);
        drop(second);
        let fourth = places.enter().unwrap();
        third.made_way().await;
        drop(twice);
        let fifth = places.enter().unwrap();
        // The last of the requests ended after it came.
        fourth.made_way().await;
        drop((first, third, fourth, fifth));
        assert_eq!(places.lock().tasks, 0);
        assert!(places.lock().connections.is_empty());
    }

    #[tokio::test]
    async fn who_has_yet_to_say_the_rest_of_its_request_makes_way() {
        let places = Places::new(2);
        let (first, second) = (places.enter().unwrap(), places.enter().unwrap());
        let (mut half, mut whole) = (first.begin().unwrap(), second.begin().unwrap());
        assert!(places.enter().is_none(), "none is idle");
        assert_eq!(whole.while_idle(async { "rest" }).await, "rest");
        let (say, rest) = tokio::sync::oneshot::channel::<()>();
        let waiting = tokio::spawn(async move {
            let _ = half.while_idle(rest).await;
        });
        tokio::task::yield_now().await;

        let third = places.enter().unwrap();

        first.made_way().await;
        say.send(()).unwrap();
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "what came too late is not done");
        waiting.abort();
        let _ = waiting.await;
        drop((first, second, third, whole));
        assert_eq!(places.lock().tasks, 0);
    }

    #[test]
    fn those_that_made_way_and_have_not_ended_are_bounded() {
        let places = Places::new(2);
        let all: Vec<_> = (0..4).map(|_| places.enter().unwrap()).collect();
        assert!(places.enter().is_none());
        assert_eq!(places.lock().connections.len(), 2);
        drop(all);
        assert!(places.enter().is_some());
    }
}
