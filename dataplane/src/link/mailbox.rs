//! Frames of one VM on their way from the socket that it shares with others to its own driver: bounded, copied
//! once, handed over all together.
//!
//! The thread that reads the socket fills it and must not wait for any VM: what does not fit is dropped and
//! counted. While a VM has the socket to itself there is nobody to be delayed, and its frames are better
//! waited with than lost: then the thread gives its driver [`GRACE`], once, until it has come to take
//! something again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mio::Waker;

use crate::engine::frame::DropReason;
use crate::link::FRAME_BYTES_MAX;

/// Frames that wait, with their lengths, bytes.
pub(super) const MAILBOX_BYTES: usize = 2 << 20;
/// How long a driver that is behind is waited for, where nobody else is.
const GRACE: Duration = Duration::from_millis(10);
const LENGTH_BYTES: usize = size_of::<u32>();

/// One VM's frames.
pub(super) struct Mailbox {
    inner: Mutex<Inner>,
    taken: Condvar,
    /// Something waits; looked at without the lock.
    news: AtomicBool,
    /// Its VM is gone.
    closed: AtomicBool,
    grace: Duration,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            taken: Condvar::new(),
            news: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            grace: GRACE,
        }
    }
}

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    waker: Option<Arc<Waker>>,
    /// The driver was waited for in vain and has taken nothing since.
    behind: bool,
    dropped: Dropped,
}

/// Frames that were not handed over.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) full: u64,
    pub(super) oversize: u64,
}

impl Dropped {
    pub(super) fn by_reason(self) -> [(DropReason, u64); 2] {
        [
            (DropReason::ReceiveQueueFull, self.full),
            (DropReason::Oversize, self.oversize),
        ]
    }
}

impl Mailbox {
    /// Whom to wake when something comes.
    pub(super) fn wake_with(&self, waker: Arc<Waker>) {
        self.lock().waker = Some(waker);
    }

    /// Puts frames in, and wakes the driver if it has none to take yet. A frame of `None` was longer than any
    /// may be. `alone`: no other VM's frames wait behind these.
    pub(super) fn put<'a>(&self, frames: impl Iterator<Item = Option<&'a [u8]>>, alone: bool) {
        let mut inner = self.lock();
        for frame in frames {
            let Some(frame) = frame.filter(|frame| frame.len() <= FRAME_BYTES_MAX) else {
                inner.dropped.oversize += 1;
                self.tell(&inner);
                continue;
            };
            let needed = LENGTH_BYTES + frame.len();
            if inner.bytes.len() + needed > MAILBOX_BYTES && alone && !inner.behind {
                self.tell(&inner);
                let full = |inner: &mut Inner| inner.bytes.len() + needed > MAILBOX_BYTES;
                inner = self
                    .taken
                    .wait_timeout_while(inner, self.grace, full)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
                inner.behind = full(&mut inner);
            }
            if inner.bytes.len() + needed > MAILBOX_BYTES {
                inner.dropped.full += 1;
                continue;
            }
            // It is no longer than FRAME_BYTES_MAX.
            inner.bytes.extend_from_slice(&(frame.len() as u32).to_ne_bytes());
            inner.bytes.extend_from_slice(frame);
        }
        if !inner.bytes.is_empty() {
            self.tell(&inner);
        }
    }

    /// Its VM was found to be gone: the driver ends.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.tell(&self.lock());
    }

    /// Whether its VM was found to be gone.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Wakes the driver, unless it was since it took something.
    fn tell(&self, inner: &Inner) {
        if !self.news.swap(true, Ordering::AcqRel)
            && let Some(waker) = &inner.waker
        {
            let _ = waker.wake();
        }
    }

    /// Whether there is something to take.
    pub(super) fn has_news(&self) -> bool {
        self.news.load(Ordering::Acquire)
    }

    /// Takes everything, in exchange for an empty buffer, and what was dropped since the last time.
    pub(super) fn take(&self, into: &mut Vec<u8>) -> Dropped {
        into.clear();
        let mut inner = self.lock();
        std::mem::swap(&mut inner.bytes, into);
        inner.behind = false;
        self.news.store(false, Ordering::Release);
        let dropped = std::mem::take(&mut inner.dropped);
        drop(inner);
        self.taken.notify_one();
        dropped
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The frame at this place of what was taken, and the place of the next.
pub(super) fn frame_at(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let (length, rest) = bytes.get(at..)?.split_first_chunk::<LENGTH_BYTES>()?;
    let length = u32::from_ne_bytes(*length) as usize;
    Some((rest.get(..length)?, at + LENGTH_BYTES + length))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn frames(bytes: &[u8]) -> Vec<Vec<u8>> {
        let (mut frames, mut at) = (Vec::new(), 0);
        while let Some((frame, next)) = frame_at(bytes, at) {
            frames.push(frame.to_vec());
            at = next;
        }
        frames
    }

    fn put(mailbox: &Mailbox, frames: &[&[u8]], alone: bool) {
        mailbox.put(frames.iter().map(|frame| Some(*frame)), alone);
    }

    #[test]
    fn frames_come_out_in_order_with_the_empty_ones() {
        let (mailbox, mut taken) = (Mailbox::default(), Vec::new());
        put(&mailbox, &[b"one", b"", b"two"], false);
        put(&mailbox, &[b"three"], false);
        assert!(mailbox.has_news());
        assert_eq!(mailbox.take(&mut taken), Dropped::default());
        assert_eq!(frames(&taken), [&b"one"[..], b"", b"two", b"three"]);
        assert!(!mailbox.has_news());
        mailbox.take(&mut taken);
        assert!(taken.is_empty());
    }

    #[test]
    fn a_full_mailbox_drops_and_counts_at_once_where_others_wait() {
        let (mailbox, mut taken) = (Mailbox::default(), Vec::new());
        let frame = vec![7; 64 << 10];
        let fit = MAILBOX_BYTES / (frame.len() + LENGTH_BYTES);
        let began = Instant::now();
        for _ in 0..fit + 1_000 {
            put(&mailbox, &[&frame], false);
        }
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        put(&mailbox, &[b"fits still"], false);
        let dropped = mailbox.take(&mut taken);
        assert_eq!(
            dropped,
            Dropped {
                full: 1_000,
                oversize: 0
            }
        );
        assert_eq!(frames(&taken).len(), fit + 1);
        put(&mailbox, &[&frame], false);
        assert_eq!(mailbox.take(&mut taken), Dropped::default());
        assert_eq!(frames(&taken).len(), 1);
    }

    #[test]
    fn a_vm_alone_is_waited_for_once_until_it_takes_something() {
        let mailbox = Mailbox::default();
        let frame = vec![7; 64 << 10];
        let began = Instant::now();
        for _ in 0..1_000 {
            put(&mailbox, &[&frame], true);
        }
        let waited = began.elapsed();
        assert!(waited >= GRACE && waited < 500 * GRACE, "{waited:?}");

        // One that takes as it goes loses nothing.
        let count = 4 * MAILBOX_BYTES / frame.len();
        let mailbox = Arc::new(Mailbox {
            // As patient as a busy machine asks for.
            grace: Duration::from_secs(20),
            ..Mailbox::default()
        });
        let taker = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            let (mut taken, mut seen) = (Vec::new(), 0);
            while seen < count {
                assert_eq!(taker.take(&mut taken), Dropped::default());
                seen += frames(&taken).len();
                std::thread::yield_now();
            }
        });
        for _ in 0..count {
            put(&mailbox, &[&frame], true);
        }
        thread.join().unwrap();
    }

    #[test]
    fn what_is_longer_than_any_frame_is_counted_and_told() {
        let mailbox = Mailbox::default();
        mailbox.put([None].into_iter(), false);
        assert!(mailbox.has_news());
        assert_eq!(mailbox.take(&mut Vec::new()).oversize, 1);
    }
}
