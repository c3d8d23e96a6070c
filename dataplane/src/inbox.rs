//! What other guests' drivers hand to one guest's: a bounded queue, and one wake-up for all that it holds.

use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_queue::ArrayQueue;

use crate::engine::frame::DropReason;
use crate::engine::switch::Passed;

/// Frames and packets of other guests that wait for one guest.
pub(crate) const INBOX_MAX: usize = 1_024;

/// One guest's inbox. Any driver puts into it; its own takes out.
#[derive(Debug)]
pub(crate) struct Inbox {
    queue: ArrayQueue<Passed>,
    /// Its driver was woken, and has yet to look.
    told: AtomicBool,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            queue: ArrayQueue::new(INBOX_MAX),
            told: AtomicBool::new(false),
        }
    }
}

impl Inbox {
    /// Puts something in. True when its driver must be woken for it.
    ///
    /// # Errors
    /// [`DropReason::PeerQueueFull`].
    pub(crate) fn put(&self, passed: Passed) -> Result<bool, DropReason> {
        self.queue.push(passed).map_err(|_| DropReason::PeerQueueFull)?;
        Ok(!self.told.swap(true, Ordering::AcqRel))
    }

    /// Its driver looks: whatever comes from now on is worth another wake-up. Before taking anything out, so
    /// that nothing is missed.
    pub(crate) fn look(&self) {
        self.told.swap(false, Ordering::AcqRel);
    }

    /// Takes out what came first.
    pub(crate) fn take(&self) -> Option<Passed> {
        self.queue.pop()
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Passed {
        Passed::Frame(Box::default())
    }

    #[test]
    fn a_full_inbox_refuses_and_takes_again_once_emptied() {
        let inbox = Inbox::default();
        for _ in 0..INBOX_MAX {
            inbox.put(frame()).unwrap();
        }
        assert_eq!(inbox.put(frame()), Err(DropReason::PeerQueueFull));
        inbox.take().unwrap();
        assert!(inbox.put(frame()).is_ok());
    }

    #[test]
    fn its_driver_is_woken_once_for_all_that_came_before_it_looked() {
        let inbox = Inbox::default();
        assert_eq!(inbox.put(frame()), Ok(true));
        assert_eq!(inbox.put(frame()), Ok(false));
        inbox.look();
        assert_eq!(inbox.put(frame()), Ok(true), "it may have missed this one");
        while inbox.take().is_some() {}
        assert!(inbox.is_empty());
        assert_eq!(inbox.put(frame()), Ok(false));
    }
}
