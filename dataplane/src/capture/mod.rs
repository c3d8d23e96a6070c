//! Captures: copies of frames for people to look at, through a bounded queue that never makes a guest wait.
//!
//! A guest's driver has a tap for each capture that looks at its guest; what the capture wants is copied into the
//! capture's queue, and what finds it full is dropped and counted. Somebody else takes it out: the thread that writes
//! the file of `--pcap-fd` ([`mod@file`]), or a task that sends it to the controlplane. Without a capture a driver asks
//! once a batch whether there is one, and that is all that it costs.

pub mod file;
mod filter;
pub mod pcapng;
pub(crate) mod tap;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crossbeam_queue::ArrayQueue;

use vnet_proto::model::CaptureFilter;

use pcapng::{Direction, PacketBlock, SNAP_BYTES_DEFAULT};

pub(crate) use tap::{Tap, Taps};

/// Frames that wait in one capture's queue.
pub const QUEUED_FRAMES_MAX: usize = 8_192;
/// Their bytes.
pub const QUEUED_BYTES_MAX: usize = 4 << 20;
/// Captures of one guest at once.
pub const CAPTURES_PER_GUEST_MAX: usize = 4;
/// Captures of one network at once.
pub const CAPTURES_PER_NETWORK_MAX: usize = 16;
/// Names of VMs that one capture has seen; what comes and goes under one name is one interface.
pub const INTERFACES_MAX: usize = 1_024;

/// What a capture is to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureSpec {
    /// Which frames.
    pub filter: CaptureFilter,
    /// How much of each, bytes.
    pub snap_bytes: u32,
    /// How many; `None` for no limit.
    pub packets_max: Option<u64>,
    /// It is over when its guest is gone.
    pub ends_with_guest: bool,
}

impl Default for CaptureSpec {
    fn default() -> Self {
        Self {
            filter: CaptureFilter::default(),
            snap_bytes: SNAP_BYTES_DEFAULT,
            packets_max: None,
            ends_with_guest: false,
        }
    }
}

/// One capture: what it wants, and what waits to be taken out.
pub struct Capture {
    spec: CaptureSpec,
    /// How many more it takes.
    left: AtomicU64,
    queue: ArrayQueue<Packet>,
    queued_bytes: AtomicUsize,
    interfaces: Mutex<Interfaces>,
    end: OnceLock<CaptureEnd>,
    /// Who takes out has looked, found nothing, and waits to be woken.
    asleep: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// Why a capture is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureEnd {
    /// Who asked for it wants no more, or is gone.
    Stopped,
    /// It has as many packets as were asked for.
    Packets,
    /// It has taken as long as was asked for.
    Duration,
    /// Its guest is gone.
    GuestGone,
}

/// A frame that was captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The number of its VM's interface in this capture.
    pub interface: u32,
    /// Nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// Which way it went.
    pub direction: Direction,
    /// Bytes that it had.
    pub original_length: u32,
    /// What is kept of it.
    pub data: Box<[u8]>,
}

impl Packet {
    /// As it is written.
    pub fn block(&self) -> PacketBlock<'_> {
        PacketBlock {
            interface: self.interface,
            at_ns: self.at_ns,
            direction: self.direction,
            original_length: self.original_length,
            data: &self.data,
        }
    }
}

/// A VM in one capture.
#[derive(Debug)]
pub struct Interface {
    /// Its number in this capture.
    pub number: u32,
    /// The VM's name.
    pub name: String,
    received: AtomicU64,
    dropped: AtomicU64,
}

impl Interface {
    /// Frames that the capture wanted of it, and how many of those it lost.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.received.load(Ordering::Relaxed),
            self.dropped.load(Ordering::Relaxed),
        )
    }
}

#[derive(Debug, Default)]
struct Interfaces {
    list: Vec<Arc<Interface>>,
    by_name: HashMap<String, Arc<Interface>>,
}

impl Capture {
    /// A capture. `wake` is called when something waits that nobody was told
    /// of: often, by guests' drivers, which it must not delay.
    pub fn new(spec: CaptureSpec, wake: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicU64::new(spec.packets_max.unwrap_or(u64::MAX)),
            spec,
            queue: ArrayQueue::new(QUEUED_FRAMES_MAX),
            queued_bytes: AtomicUsize::new(0),
            interfaces: Mutex::default(),
            end: OnceLock::new(),
            asleep: AtomicBool::new(false),
            wake,
        })
    }

    /// The longest part of a frame that is kept.
    pub fn snap_bytes(&self) -> u32 {
        self.spec.snap_bytes
    }

    /// A guest's part in it, by its VM's name. `None` when it has seen as many names as it may.
    pub(crate) fn tap(self: &Arc<Self>, name: &str) -> Option<Tap> {
        let mut interfaces = self.lock();
        if let Some(known) = interfaces.by_name.get(name) {
            return Some(Tap::new(Arc::clone(self), Arc::clone(known)));
        }
        if interfaces.list.len() >= INTERFACES_MAX {
            return None;
        }
        let interface = Arc::new(Interface {
            number: u32::try_from(interfaces.list.len()).ok()?,
            name: name.to_owned(),
            received: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        });
        interfaces.list.push(Arc::clone(&interface));
        interfaces.by_name.insert(name.to_owned(), Arc::clone(&interface));
        Some(Tap::new(Arc::clone(self), interface))
    }

    /// The VMs that it has seen, from a number on, in order of their numbers.
    pub fn interfaces_from(&self, number: u32) -> Vec<Arc<Interface>> {
        self.lock().list.iter().skip(number as usize).cloned().collect()
    }

    /// Copies a frame into the queue, if it is wanted. False when there was no room, which is counted.
    fn offer(&self, interface: &Interface, at_ns: u64, direction: Direction, frame: &[u8]) -> bool {
        if self.end.get().is_some() || !filter::wants(&self.spec.filter, frame) {
            return true;
        }
        interface.received.fetch_add(1, Ordering::Relaxed);
        let kept = &frame[..frame.len().min(self.spec.snap_bytes as usize)];
        let before = self.queued_bytes.fetch_add(kept.len(), Ordering::Relaxed);
        let has_room = before + kept.len() <= QUEUED_BYTES_MAX && !self.queue.is_full();
        let pushed = has_room
            && self
                .queue
                .push(Packet {
                    interface: interface.number,
                    at_ns,
                    direction,
                    original_length: u32::try_from(frame.len()).unwrap_or(u32::MAX),
                    data: kept.into(),
                })
                .is_ok();
        if !pushed {
            self.queued_bytes.fetch_sub(kept.len(), Ordering::Relaxed);
            interface.dropped.fetch_add(1, Ordering::Relaxed);
        }
        // The last that it takes; one that has no limit never gets there.
        if pushed && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.stop(CaptureEnd::Packets);
        }
        // Also when it was full: whoever takes out must know that there is something.
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            (self.wake)();
        }
        pushed
    }

    /// Takes out what came first.
    pub fn take(&self) -> Option<Packet> {
        let packet = self.queue.pop()?;
        self.queued_bytes.fetch_sub(packet.data.len(), Ordering::Relaxed);
        Some(packet)
    }

    /// Whoever takes out is about to wait: from now on it is woken for what comes. True when nothing has come
    /// meanwhile, and it may.
    pub fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        self.queue.is_empty() && self.end.get().is_none()
    }

    /// Ends it: nothing more is copied. The first reason stays.
    pub fn stop(&self, why: CaptureEnd) {
        // Whoever came first has said it.
        let _ = self.end.set(why);
        self.asleep.store(false, Ordering::SeqCst);
        (self.wake)();
    }

    /// Why it is over, if it is. What was copied before can still be taken out.
    pub fn end(&self) -> Option<CaptureEnd> {
        self.end.get().copied()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Interfaces> {
        self.interfaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture")
            .field("spec", &self.spec)
            .field("queued", &self.queue.len())
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(snap_bytes: u32) -> (Arc<Capture>, Arc<AtomicUsize>) {
        capture_of(CaptureSpec {
            snap_bytes,
            ..CaptureSpec::default()
        })
    }

    fn capture_of(spec: CaptureSpec) -> (Arc<Capture>, Arc<AtomicUsize>) {
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let wake = move || {
            count.fetch_add(1, Ordering::SeqCst);
        };
        (Capture::new(spec, Box::new(wake)), woken)
    }

    #[test]
    fn what_finds_the_queue_full_is_dropped_and_counted_by_frames_and_by_bytes() {
        let (capture, _) = capture(1 << 20);
        let tap = capture.tap("web").unwrap();
        for _ in 0..QUEUED_FRAMES_MAX {
            assert!(tap.offer(1, Direction::Inbound, b"x"));
        }
        assert!(!tap.offer(1, Direction::Inbound, b"x"));
        while capture.take().is_some() {}
        assert_eq!(tap.counts(), (QUEUED_FRAMES_MAX as u64 + 1, 1));

        let large = vec![0; QUEUED_BYTES_MAX / 4];
        for _ in 0..4 {
            assert!(tap.offer(1, Direction::Inbound, &large));
        }
        assert!(!tap.offer(1, Direction::Inbound, b"x"), "not one byte more");
        capture.take().unwrap();
        assert!(tap.offer(1, Direction::Inbound, b"x"), "room again");
        assert_eq!(tap.counts().1, 2);
    }

    #[test]
    fn a_frame_is_cut_and_its_length_kept() {
        let (capture, _) = capture(4);
        capture
            .tap("web")
            .unwrap()
            .offer(7, Direction::Outbound, b"abcdef");
        let packet = capture.take().unwrap();
        assert_eq!(
            (&*packet.data, packet.original_length, packet.at_ns),
            (&b"abcd"[..], 6, 7)
        );
    }

    #[test]
    fn it_is_over_with_the_last_packet_that_was_asked_for_and_counts_what_it_wanted() {
        let (capture, _) = capture_of(CaptureSpec {
            filter: "arp".parse().unwrap(),
            packets_max: Some(2),
            ..CaptureSpec::default()
        });
        let tap = capture.tap("web").unwrap();
        let arp = [&[2; 12][..], &[8, 6]].concat();
        let other = [&[2; 12][..], &[8, 0]].concat();
        for frame in [&arp, &other, &arp, &arp] {
            assert!(tap.offer(1, Direction::Inbound, frame));
        }
        assert_eq!(capture.end(), Some(CaptureEnd::Packets));
        assert_eq!(std::iter::from_fn(|| capture.take()).count(), 2);
        assert_eq!(tap.counts(), (2, 0), "what it does not want is not counted");
    }

    #[test]
    fn a_guest_that_goes_ends_what_was_its_alone() {
        for ends_with_guest in [true, false] {
            let (capture, woken) = capture_of(CaptureSpec {
                ends_with_guest,
                ..CaptureSpec::default()
            });
            drop(capture.tap("web").unwrap());
            assert_eq!(capture.end(), ends_with_guest.then_some(CaptureEnd::GuestGone));
            assert_eq!(woken.load(Ordering::SeqCst), usize::from(ends_with_guest));
        }
    }

    #[test]
    fn a_name_is_one_interface_however_often_it_comes_and_they_have_a_limit() {
        let (capture, _) = capture(64);
        for number in 0..INTERFACES_MAX {
            assert!(capture.tap(&format!("vm-{number}")).is_some());
        }
        assert!(capture.tap("one-more").is_none());
        assert!(capture.tap("vm-3").is_some(), "known already");
        assert_eq!(capture.interfaces_from(INTERFACES_MAX as u32 - 1).len(), 1);
    }

    #[test]
    fn who_takes_out_is_woken_once_it_sleeps_and_not_for_each_frame() {
        let (capture, woken) = capture(64);
        let tap = capture.tap("web").unwrap();
        tap.offer(1, Direction::Inbound, b"a");
        assert!(!capture.may_sleep(), "there is one");
        tap.offer(1, Direction::Inbound, b"b");
        tap.offer(1, Direction::Inbound, b"c");
        assert_eq!(woken.load(Ordering::SeqCst), 1);
        while capture.take().is_some() {}
        assert!(capture.may_sleep());
        capture.stop(CaptureEnd::Stopped);
        assert_eq!(woken.load(Ordering::SeqCst), 2, "the end wakes too");
        assert!(!capture.may_sleep());
    }
}
