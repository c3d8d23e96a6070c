//! Which connections wait with an unfinished request, and which of them makes way.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Connections whose tasks are there for one that may be reading: those that make way, or are being answered,
/// take a moment.
const TASKS_PER_HEAD: usize = 2;

/// The heads of one socket that are being read.
#[derive(Debug)]
pub(super) struct Heads {
    most: usize,
    reading: Mutex<Reading>,
    /// Tasks, also of those that are answered.
    tasks: AtomicUsize,
}

#[derive(Debug, Default)]
struct Reading {
    next: u64,
    /// The longest there first.
    order: VecDeque<(u64, oneshot::Sender<()>)>,
}

/// A connection's place among them.
#[derive(Debug)]
pub(super) struct Place {
    heads: Arc<Heads>,
    number: u64,
    make_way: oneshot::Receiver<()>,
}

impl Heads {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most: most.max(1),
            reading: Mutex::default(),
            tasks: AtomicUsize::new(0),
        })
    }

    /// A place for one more; where all are taken, the one there longest makes way. `None` while those that were to
    /// make way have not ended.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Place> {
        let most = self.most * TASKS_PER_HEAD;
        let one_more = |tasks| (tasks < most).then_some(tasks + 1);
        self.tasks
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()?;
        let mut reading = self.lock();
        if reading.order.len() >= self.most
            && let Some((_, longest)) = reading.order.pop_front()
        {
            // One that has just finished needs no word.
            let _ = longest.send(());
        }
        let number = reading.next;
        reading.next += 1;
        let (sender, make_way) = oneshot::channel();
        reading.order.push_back((number, sender));
        drop(reading);
        Some(Place {
            heads: Arc::clone(self),
            number,
            make_way,
        })
    }

    /// Heads that are being read.
    #[cfg(test)]
    pub(super) fn reading(&self) -> usize {
        self.lock().order.len()
    }

    fn lock(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one out of the order; false if it made way.
    fn leave(&self, number: u64) -> bool {
        let mut reading = self.lock();
        let found = reading.order.iter().position(|(other, _)| *other == number);
        found.and_then(|at| reading.order.remove(at)).is_some()
    }
}

impl Place {
    /// Waits until it is to make way.
    pub(super) async fn made_way(&mut self) {
        if (&mut self.make_way).await.is_err() {
            // It left by itself.
            std::future::pending().await
        }
    }

    /// Its head is no longer being read; whether it had to make way. The place stays counted as a task's until the
    /// end of what is returned.
    pub(super) fn leave(&self) -> bool {
        !self.heads.leave(self.number)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.heads.leave(self.number);
        self.heads.tasks.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_one_there_longest_makes_way_and_those_on_their_way_out_are_bounded() {
        let heads = Heads::new(2);
        let mut first = heads.enter().unwrap();
        let mut second = heads.enter().unwrap();
        let third = heads.enter().unwrap();
        first.made_way().await;
        assert!(first.leave());
        let fourth = heads.enter().unwrap();
        second.made_way().await;
        assert!(heads.enter().is_none(), "none of the four has ended");
        assert!(!fourth.leave(), "it had finished by itself");
        drop((first, second, third, fourth));
        let _again = heads.enter().unwrap();
        assert_eq!(heads.lock().order.len(), 1);
        assert_eq!(heads.tasks.load(Ordering::Relaxed), 1);
    }
}
