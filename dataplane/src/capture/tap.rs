//! What a guest's driver shows to captures: frames as they are read, and frames as they leave.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::capture::pcapng::Direction;
use crate::capture::{CAPTURES_PER_GUEST_MAX, Capture, CaptureEnd, Interface};
use crate::engine::transmit::Transmit;

/// One guest's part in one capture.
#[derive(Debug)]
pub struct Tap {
    capture: Arc<Capture>,
    interface: Arc<Interface>,
}

impl Tap {
    pub(super) fn new(capture: Arc<Capture>, interface: Arc<Interface>) -> Self {
        Self { capture, interface }
    }

    pub(super) fn offer(&self, at_ns: u64, direction: Direction, frame: &[u8]) -> bool {
        self.capture.offer(&self.interface, at_ns, direction, frame)
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (u64, u64) {
        self.interface.counts()
    }
}

/// The guest is gone, or the capture is over.
impl Drop for Tap {
    fn drop(&mut self) {
        if self.capture.spec.ends_with_guest {
            self.capture.stop(CaptureEnd::GuestGone);
        }
    }
}

/// A guest's taps.
#[derive(Debug, Default)]
pub(crate) struct Taps {
    taps: Vec<Tap>,
}

impl Taps {
    /// One more; `queue` is what waits for the guest now, which it is not shown. False when there are as many as
    /// may be.
    pub(crate) fn add(&mut self, tap: Tap, queue: &mut Transmit) -> bool {
        self.prune();
        if self.taps.len() >= CAPTURES_PER_GUEST_MAX {
            return false;
        }
        if self.taps.is_empty() {
            queue.skip_unseen();
        }
        self.taps.push(tap);
        true
    }

    /// Whether anything is captured, asked once a batch. Captures that are over are let go of.
    pub(crate) fn are_open(&mut self) -> bool {
        if self.taps.is_empty() {
            return false;
        }
        self.prune();
        !self.taps.is_empty()
    }

    /// Shows a frame that was read from the guest. How many captures lost it.
    pub(crate) fn show_sent(&self, at_ns: u64, frame: &[u8]) -> u64 {
        self.show(at_ns, Direction::Outbound, frame)
    }

    /// Shows the frames that were queued for the guest since the last time, each once. How many were lost.
    pub(crate) fn show_queued(&self, at_ns: u64, queue: &mut Transmit) -> u64 {
        let mut dropped = 0;
        queue.see(|frame| dropped += self.show(at_ns, Direction::Inbound, frame));
        dropped
    }

    fn show(&self, at_ns: u64, direction: Direction, frame: &[u8]) -> u64 {
        let lost = |tap: &&Tap| !tap.offer(at_ns, direction, frame);
        self.taps.iter().filter(lost).count() as u64
    }

    fn prune(&mut self) {
        self.taps.retain(|tap| tap.capture.end().is_none());
    }
}

/// The time now, in nanoseconds since the Unix epoch.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::CaptureSpec;
    use crate::engine::transmit::{Framing, PREFIX_BYTES};
    use crate::mac::Mac;

    fn capture() -> Arc<Capture> {
        Capture::new(CaptureSpec::default(), Box::new(|| {}))
    }

    fn taken(capture: &Capture) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| capture.take())
            .map(|packet| packet.data.into())
            .collect()
    }

    #[test]
    fn each_frame_to_the_guest_is_seen_once_however_the_link_takes_them() {
        for framing in [Framing::Be32, Framing::Le16] {
            let (capture, mut taps) = (capture(), Taps::default());
            let mut queue = Transmit::new(Mac::BROADCAST);
            queue.set_framing(framing);
            let prefix = framing.prefix_bytes();
            assert!(queue.frame(b"before the capture"));
            assert!(taps.add(capture.tap("web").unwrap(), &mut queue));
            assert!(queue.frame(b"one") && queue.frame(b"two"));
            assert_eq!(taps.show_queued(1, &mut queue), 0);
            assert_eq!(taken(&capture), [b"one", b"two"]);
            // The link takes all of the first and a part of the second; the third comes meanwhile.
            queue.consume(prefix + 18 + 2);
            assert!(queue.frame(b"three"));
            taps.show_queued(1, &mut queue);
            assert_eq!(taken(&capture), [b"three"]);
            taps.show_queued(1, &mut queue);
            assert!(taken(&capture).is_empty());
            queue.consume(usize::MAX / 2);
            assert!(queue.is_empty() && queue.frame(b"four"));
            taps.show_queued(1, &mut queue);
            assert_eq!(taken(&capture), [b"four"]);
        }
    }

    #[test]
    fn a_queue_that_moves_to_its_beginning_shows_nothing_twice_and_nothing_never() {
        let (capture, mut taps) = (capture(), Taps::default());
        let mut queue = Transmit::new(Mac::BROADCAST);
        taps.add(capture.tap("web").unwrap(), &mut queue);
        let mut sent = 0u32;
        let mut seen = Vec::new();
        for round in 0..2_000usize {
            let frame = [sent.to_be_bytes().as_slice(), &vec![7; 1 + round % 4_000]].concat();
            if queue.frame(&frame) {
                sent += 1;
            }
            if round % 3 == 0 {
                taps.show_queued(1, &mut queue);
                let frames = taken(&capture);
                seen.extend(
                    frames
                        .iter()
                        .map(|f| u32::from_be_bytes(f[..4].try_into().unwrap())),
                );
                queue.consume(PREFIX_BYTES + 2_500);
            }
        }
        taps.show_queued(1, &mut queue);
        seen.extend(
            taken(&capture)
                .iter()
                .map(|f| u32::from_be_bytes(f[..4].try_into().unwrap())),
        );
        assert!(sent > 500);
        assert_eq!(seen, (0..sent).collect::<Vec<_>>());
    }

    #[test]
    fn directions_are_those_of_the_vm_and_captures_have_a_limit() {
        let mut taps = Taps::default();
        let mut queue = Transmit::new(Mac::BROADCAST);
        let captures: Vec<_> = (0..=CAPTURES_PER_GUEST_MAX).map(|_| capture()).collect();
        for capture in &captures[..CAPTURES_PER_GUEST_MAX] {
            assert!(taps.add(capture.tap("web").unwrap(), &mut queue));
        }
        let last = &captures[CAPTURES_PER_GUEST_MAX];
        assert!(!taps.add(last.tap("web").unwrap(), &mut queue));
        captures[0].stop(CaptureEnd::Stopped);
        assert!(taps.add(last.tap("web").unwrap(), &mut queue), "one is over");

        taps.show_sent(9, b"up");
        assert!(queue.frame(b"down"));
        taps.show_queued(9, &mut queue);
        assert!(captures[0].take().is_none());
        let (up, down) = (last.take().unwrap(), last.take().unwrap());
        assert_eq!((up.direction, &*up.data), (Direction::Outbound, &b"up"[..]));
        assert_eq!((down.direction, &*down.data), (Direction::Inbound, &b"down"[..]));
        for capture in &captures {
            capture.stop(CaptureEnd::Stopped);
        }
        assert!(!taps.are_open());
    }
}
