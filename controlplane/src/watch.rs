//! Watches: bounded queues from the hub to slow readers.
//!
//! A reader that falls behind loses changes, and is told so exactly where they are missing: when its
//! queue is full, what follows is counted instead of kept until the reader has drained the queue and
//! taken the gap. The hub never waits for a reader. A change is kept once, however many are still to read it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;

use crate::metrics::Metrics;
use crate::refusal::Refusal;

/// The hub's side of all watches of one kind. `F` is what a reader asked for, `T` what it gets.
#[derive(Debug)]
pub struct Watchers<F, T> {
    watchers: Vec<(F, Weak<Shared<T>>)>,
    capacity: usize,
    limit: usize,
    metrics: Arc<Metrics>,
}

/// A reader's side. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch<T>(Arc<Shared<T>>);

/// What a reader gets next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// A change.
    Change(T),
    /// So many changes are missing here.
    Gap(u64),
    /// The controlplane ends.
    Closed,
}

#[derive(Debug)]
struct Shared<T> {
    queue: Mutex<Queue<T>>,
    wake: Notify,
}

#[derive(Debug)]
struct Queue<T> {
    items: VecDeque<Arc<T>>,
    missed: u64,
    closed: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F, T> Watchers<F, T> {
    /// Queues of `capacity` changes each, for at most `limit` readers.
    pub fn new(capacity: usize, limit: usize, metrics: Arc<Metrics>) -> Self {
        Self {
            watchers: Vec::new(),
            capacity,
            limit,
            metrics,
        }
    }

    /// Adds a reader, whose queue starts with `first` whatever its length.
    ///
    /// # Errors
    /// [`Refusal::Limit`] if there are too many.
    pub fn add(&mut self, filter: F, first: impl IntoIterator<Item = T>) -> Result<Watch<T>, Refusal> {
        self.watchers.retain(|(_, w)| w.strong_count() > 0);
        if self.watchers.len() >= self.limit {
            self.metrics.watches_refused.add(1);
            let text = format!(
                "{} clients watch already, which is the limit; end one of them",
                self.limit
            );
            return Err(Refusal::Limit(text));
        }
        let items = first.into_iter().map(Arc::new).collect();
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                items,
                missed: 0,
                closed: false,
            }),
            wake: Notify::new(),
        });
        self.watchers.push((filter, Arc::downgrade(&shared)));
        Ok(Watch(shared))
    }

    /// Whether nobody watches, so that what nobody would read need not be made.
    pub fn is_empty(&self) -> bool {
        self.watchers.is_empty()
    }

    /// Gives each reader what `make` makes of its filter, `None` being nothing.
    pub fn publish(&mut self, mut make: impl FnMut(&F) -> Option<Arc<T>>) {
        let (capacity, metrics) = (self.capacity, &self.metrics);
        self.watchers.retain(|(filter, watch)| {
            let Some(shared) = watch.upgrade() else {
                return false;
            };
            if let Some(item) = make(filter) {
                let mut queue = shared.lock();
                if queue.missed > 0 || queue.items.len() >= capacity {
                    queue.missed += 1;
                    metrics.changes_missed.add(1);
                } else {
                    queue.items.push_back(item);
                }
                drop(queue);
                shared.wake.notify_one();
            }
            true
        });
    }

    /// Ends every watch once its reader has read what is queued.
    pub fn close(&mut self) {
        for (_, watch) in self.watchers.drain(..) {
            if let Some(shared) = watch.upgrade() {
                shared.lock().closed = true;
                shared.wake.notify_one();
            }
        }
    }
}

impl<T: Clone> Watch<T> {
    /// Waits for the next change.
    pub async fn next(&mut self) -> Next<T> {
        loop {
            if let Some(next) = self.try_next() {
                return next;
            }
            self.0.wake.notified().await;
        }
    }

    /// The next change, if there is one now.
    pub fn try_next(&mut self) -> Option<Next<T>> {
        let mut queue = self.0.lock();
        if let Some(item) = queue.items.pop_front() {
            return Some(Next::Change(Arc::unwrap_or_clone(item)));
        }
        if queue.missed > 0 {
            return Some(Next::Gap(std::mem::take(&mut queue.missed)));
        }
        queue.closed.then_some(Next::Closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_reader_gets_one_gap_where_changes_are_missing() {
        let mut watchers: Watchers<(), u32> = Watchers::new(2, 1, Arc::default());
        let mut watch = watchers.add((), []).unwrap();
        for n in 0..5 {
            watchers.publish(|()| Some(Arc::new(n)));
        }
        assert_eq!(watch.try_next(), Some(Next::Change(0)));
        // Still behind: what comes now is missing too, so that the gap stands at one place.
        watchers.publish(|()| Some(Arc::new(5)));
        assert_eq!(watch.try_next(), Some(Next::Change(1)));
        assert_eq!(watch.try_next(), Some(Next::Gap(4)));
        assert_eq!(watch.try_next(), None);
        watchers.publish(|()| Some(Arc::new(6)));
        assert_eq!(watch.try_next(), Some(Next::Change(6)));
    }

    #[test]
    fn readers_are_limited_and_make_room_when_they_leave() {
        let metrics: Arc<Metrics> = Arc::default();
        let mut watchers: Watchers<(), u32> = Watchers::new(1, 1, Arc::clone(&metrics));
        let first = watchers.add((), []).unwrap();
        assert!(matches!(watchers.add((), []), Err(Refusal::Limit(text)) if text.starts_with("1 clients")));
        assert_eq!(metrics.watches_refused.get(), 1);
        drop(first);
        assert!(watchers.add((), [1, 2]).is_ok());
    }

    #[test]
    fn a_change_is_kept_once_however_many_do_not_read_it() {
        let mut watchers: Watchers<(), String> = Watchers::new(2, 100, Arc::default());
        let watches: Vec<_> = (0..100).map(|_| watchers.add((), []).unwrap()).collect();
        let change = Arc::new("a change".to_owned());

        watchers.publish(|()| Some(Arc::clone(&change)));

        assert_eq!(Arc::strong_count(&change), 1 + watches.len());
        for mut watch in watches {
            assert_eq!(watch.try_next(), Some(Next::Change("a change".to_owned())));
        }
        assert_eq!(Arc::strong_count(&change), 1);
    }

    #[tokio::test]
    async fn closing_ends_a_watch_after_what_is_queued() {
        let mut watchers: Watchers<(), u32> = Watchers::new(4, 1, Arc::default());
        let mut watch = watchers.add((), [1]).unwrap();
        watchers.close();
        assert_eq!(watch.next().await, Next::Change(1));
        assert_eq!(watch.next().await, Next::Closed);
    }
}
