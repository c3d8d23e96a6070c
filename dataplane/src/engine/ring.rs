//! Memory for TCP flows' rings: lazily touched, reused within one VM, given back when idle.
//!
//! Rings are large (a window must cover a burst) but most flows carry little. So they are virtual
//! memory: a flow that carries a few bytes touches one page of each ring, and one that carried much
//! gives its pages back once it is idle. A pool belongs to one VM, so that no bytes of one VM are
//! ever behind another's.
//!
//! A page of each ring is any flow's, and there are so many flows at most. What is more has a limit of
//! its own for each direction, [`GROWTH_BYTES_MAX`], so that a guest that lets connections fill up and
//! stand still cannot make them all take what one may:
//!
//! - The ring for what goes to the guest grows in steps, when what it may hold was filled. Beyond the
//!   limit it stays as it is: it is filled, sent and acknowledged in smaller pieces.
//! - The size of the ring for what the guest sends is what the guest is told as window, and cannot change
//!   later. It is chosen when the connection opens, smaller when little of the limit is left.
//!
//! So a connection beyond the limit is slower, and none is broken; but where a name is demanded of it, the
//! bytes that say it must fit in the smaller ring.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

/// The ring for what the guest sent, bytes. Exactly `65535 << 2`: smoltcp books the unscaled window of
/// the SYN-ACK as if it were scaled, and a capacity beyond that can be made to panic by a guest.
pub const RECEIVE_BYTES: usize = 65_535 << 2;
/// The ring for what goes to the guest, bytes.
pub const SEND_BYTES: usize = 256 << 10;

/// What the rings of one VM for one direction may have beyond a page each, bytes: a thousand of them at
/// full size.
pub const GROWTH_BYTES_MAX: usize = 256 << 20;
/// Any flow's part of either ring, bytes.
pub const FIRST_BYTES: usize = 4096;
/// How the ring that goes to the guest grows.
const GROWTH_FACTOR: usize = 4;
/// Sizes of the ring for what the guest sends. No window of the SYN-ACK, taken for scaled, is above its ring.
const RECEIVE_STEPS: [usize; 4] = [RECEIVE_BYTES, 65_535, 16 << 10, FIRST_BYTES];
/// A ring for what the guest sends takes at most this part of what is left.
const RECEIVE_PART: usize = 16;
/// Slots given back that keep pages; of more of them nothing is kept.
const FREE_KEPT_MAX: usize = 256;

const SLOT_BYTES: usize = 512 << 10;
const SEND_OFFSET: usize = 256 << 10;
const CHUNK_SLOTS: usize = 64;
/// Bytes of each ring that stay resident when a slot is given back: one request and answer.
const KEEP_BYTES: usize = FIRST_BYTES;

const _: () = assert!(RECEIVE_BYTES <= SEND_OFFSET && SEND_OFFSET + SEND_BYTES <= SLOT_BYTES);

/// Hands out ring memory for one VM.
#[derive(Clone)]
pub struct RingPool(Arc<Mutex<Pool>>);

struct Pool {
    chunks: Vec<Arc<Chunk>>,
    free: Vec<(usize, usize)>,
    /// What is left of the growth of either ring, bytes.
    receive_left: usize,
    send_left: usize,
    /// Rings that are smaller than they would be.
    refused: u64,
}

/// Only ever read or written through the slices of its slots.
struct Chunk {
    map: MmapMut,
    base: *mut u8,
}

// SAFETY: `base` points into `map`, which is never moved or unmapped while the chunk lives; slots
// hand out disjoint ranges of it, each to one owner.
unsafe impl Send for Chunk {}
// SAFETY: as above; the chunk itself is only used for `madvise`, which is safe to call from anywhere.
unsafe impl Sync for Chunk {}

/// Two rings of one flow. Their slices must be gone before the slot is.
pub struct Slot {
    pool: RingPool,
    chunk: Arc<Chunk>,
    at: (usize, usize),
    receive_bytes: usize,
    /// How far the send ring may be filled, from its start.
    send_bytes: usize,
    /// As far as that it was filled.
    wants_more: bool,
    /// It was counted as refused.
    refused: bool,
}

impl Default for RingPool {
    fn default() -> Self {
        Self::new(GROWTH_BYTES_MAX, GROWTH_BYTES_MAX)
    }
}

impl RingPool {
    /// A pool whose rings may have so much beyond their first pages, bytes.
    pub fn new(receive_bytes_max: usize, send_bytes_max: usize) -> Self {
        Self(Arc::new(Mutex::new(Pool {
            chunks: Vec::new(),
            free: Vec::new(),
            receive_left: receive_bytes_max,
            send_left: send_bytes_max,
            refused: 0,
        })))
    }

    /// Rings that were made, or stayed, smaller than they would be without a limit.
    pub fn refused(&self) -> u64 {
        self.lock().refused
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for one flow; `None` when the system has no address space left.
    pub fn take(&self) -> Option<Slot> {
        let mut pool = self.lock();
        if pool.free.is_empty() {
            let mut map = MmapMut::map_anon(SLOT_BYTES * CHUNK_SLOTS).ok()?;
            #[cfg(target_os = "linux")]
            // One touched byte must cost one small page. Failure costs memory, nothing else.
            let _ = map.advise(memmap2::Advice::NoHugePage);
            let base = map.as_mut_ptr();
            let index = pool.chunks.len();
            pool.chunks.push(Arc::new(Chunk { map, base }));
            pool.free.extend((0..CHUNK_SLOTS).rev().map(|slot| (index, slot)));
        }
        let at = pool.free.pop()?;
        let receive_bytes = pool.take_receive();
        let refused = receive_bytes < RECEIVE_BYTES;
        pool.refused += u64::from(refused);
        Some(Slot {
            pool: self.clone(),
            chunk: Arc::clone(&pool.chunks[at.0]),
            at,
            receive_bytes,
            send_bytes: FIRST_BYTES,
            wants_more: false,
            refused,
        })
    }
}

impl Pool {
    fn take_receive(&mut self) -> usize {
        let most = FIRST_BYTES + self.receive_left / RECEIVE_PART;
        let size = RECEIVE_STEPS.into_iter().find(|size| *size <= most);
        let size = size.unwrap_or(FIRST_BYTES);
        self.receive_left -= size - FIRST_BYTES;
        size
    }
}

impl Slot {
    /// The receive and the send ring.
    ///
    /// # Safety
    /// Call once for a slot, and drop whatever holds the slices before the slot.
    pub unsafe fn slices(&mut self) -> (&'static mut [u8], &'static mut [u8]) {
        // SAFETY: the slot owns these bytes of the mapping alone, the ranges do not overlap, and the
        // caller promises that they are gone before the slot (which keeps the mapping) is.
        unsafe {
            let base = self.chunk.base.add(self.at.1 * SLOT_BYTES);
            (
                std::slice::from_raw_parts_mut(base, self.receive_bytes),
                std::slice::from_raw_parts_mut(base.add(SEND_OFFSET), SEND_BYTES),
            )
        }
    }

    /// The part of `room`, which is free space of the send ring, that may be filled now. Empty: not before
    /// something of what it holds was acknowledged.
    pub fn allow<'a>(&mut self, room: &'a mut [u8]) -> &'a mut [u8] {
        if self.send_bytes == SEND_BYTES {
            return room;
        }
        if self.wants_more {
            self.grow();
        }
        // From its start, not by what it holds: a ring that never runs empty goes round, and so touches all.
        let at = (room.as_ptr() as usize).wrapping_sub(self.send_start());
        let length = room.len().min(self.send_bytes.saturating_sub(at));
        self.wants_more = length == 0;
        &mut room[..length]
    }

    /// All that was allowed was filled: there is more to come.
    pub fn note_filled(&mut self) {
        self.wants_more = true;
    }

    fn grow(&mut self) {
        let wanted = (self.send_bytes * GROWTH_FACTOR).min(SEND_BYTES);
        let more = wanted - self.send_bytes;
        let mut pool = self.pool.lock();
        if more <= pool.send_left {
            pool.send_left -= more;
            self.send_bytes = wanted;
        } else if !std::mem::replace(&mut self.refused, true) {
            pool.refused += 1;
        }
    }

    fn send_start(&self) -> usize {
        (self.chunk.base as usize) + self.at.1 * SLOT_BYTES + SEND_OFFSET
    }

    /// Gives the pages of both rings back to the system but for the first of each. Only for rings
    /// that hold nothing: what was there reads as zero afterwards.
    pub fn shrink(&mut self) {
        self.pool.lock().send_left += self.send_bytes - FIRST_BYTES;
        self.send_bytes = FIRST_BYTES;
        self.give_back(KEEP_BYTES);
    }

    /// Gives all pages back but those of so many bytes of each ring.
    fn give_back(&mut self, keep_bytes: usize) {
        let base = self.at.1 * SLOT_BYTES;
        for ring in [base, base + SEND_OFFSET] {
            // SAFETY: the bytes belong to this slot and its owner says that they hold nothing; private
            // anonymous memory reads as zero after this.
            let given_back = unsafe {
                self.chunk.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    ring + keep_bytes,
                    SEND_OFFSET - keep_bytes,
                )
            };
            debug_assert!(given_back.is_ok(), "{given_back:?}");
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let pool = self.pool.clone();
        if pool.lock().free.len() >= FREE_KEPT_MAX {
            self.give_back(0);
        }
        let mut pool = pool.lock();
        pool.receive_left += self.receive_bytes - FIRST_BYTES;
        pool.send_left += self.send_bytes - FIRST_BYTES;
        pool.free.push(self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap_and_are_reused() {
        let pool = RingPool::default();
        let mut slots: Vec<Slot> = (0..CHUNK_SLOTS + 1).map(|_| pool.take().unwrap()).collect();
        for (mark, slot) in slots.iter_mut().enumerate() {
            // SAFETY: the slices are gone at the end of this turn; each slot gives them once here.
            let (receive, send) = unsafe { slot.slices() };
            receive.fill(mark as u8);
            send.fill(!(mark as u8));
        }
        for (mark, slot) in slots.iter_mut().enumerate() {
            // SAFETY: the earlier slices are gone.
            let (receive, send) = unsafe { slot.slices() };
            assert!(receive.iter().all(|b| *b == mark as u8) && send.iter().all(|b| *b == !(mark as u8)));
        }
        slots[0].shrink();
        // SAFETY: the earlier slices are gone.
        let (receive, _) = unsafe { slots[0].slices() };
        assert_eq!(
            receive[KEEP_BYTES..].iter().map(|b| u64::from(*b)).sum::<u64>(),
            0
        );
        let at = slots[3].at;
        drop(slots.remove(3));
        assert_eq!(pool.take().unwrap().at, at);
    }

    /// Fills a slot's send ring without anything being acknowledged, as far as it may.
    fn fill(slot: &mut Slot) -> usize {
        // SAFETY: the slices are gone at the end of this function.
        let (_, send) = unsafe { slot.slices() };
        let mut filled = 0;
        loop {
            slot.note_filled();
            match slot.allow(&mut send[filled..]).len() {
                0 => return filled,
                length => filled += length,
            }
        }
    }

    #[test]
    fn rings_grow_in_steps_until_the_limit_and_stay_as_they_are_then() {
        let one = SEND_BYTES - FIRST_BYTES;
        let pool = RingPool::new(GROWTH_BYTES_MAX, one + 3 * FIRST_BYTES);
        let mut slots: Vec<Slot> = (0..4).map(|_| pool.take().unwrap()).collect();
        let filled: Vec<usize> = slots.iter_mut().map(fill).collect();
        assert_eq!(filled, [SEND_BYTES, 4 * FIRST_BYTES, FIRST_BYTES, FIRST_BYTES]);
        assert_eq!(pool.refused(), 3);
        assert_eq!(pool.lock().send_left, 0);
        // What one gives back another has.
        slots[0].shrink();
        assert_eq!(fill(&mut slots[3]), SEND_BYTES);
        drop(slots);
        assert_eq!(pool.lock().send_left, one + 3 * FIRST_BYTES);
    }

    #[test]
    fn a_thousand_connections_have_full_windows_and_those_beyond_the_limit_small_ones() {
        let pool = RingPool::default();
        let slots: Vec<Slot> = (0..2_000).map(|_| pool.take().unwrap()).collect();
        assert!(
            slots[..1_000]
                .iter()
                .all(|slot| slot.receive_bytes == RECEIVE_BYTES)
        );
        assert!(slots.is_sorted_by(|a, b| a.receive_bytes >= b.receive_bytes));
        assert_eq!(slots[1_999].receive_bytes, FIRST_BYTES);
        let beyond: usize = slots.iter().map(|slot| slot.receive_bytes - FIRST_BYTES).sum();
        assert!(beyond <= GROWTH_BYTES_MAX, "{beyond}");
        let small = slots
            .iter()
            .filter(|slot| slot.receive_bytes < RECEIVE_BYTES)
            .count();
        assert_eq!(pool.refused(), small as u64);
        drop(slots);
        assert_eq!(pool.lock().receive_left, GROWTH_BYTES_MAX);
    }

    /// Pages of a slot that are memory.
    #[cfg(target_os = "linux")]
    fn resident(chunk: &Chunk, slot: usize) -> usize {
        let page = KEEP_BYTES;
        let mut pages = vec![0u8; SLOT_BYTES / page];
        // SAFETY: the range is within the mapping, and there is a byte for each page of it.
        let result = unsafe {
            libc::mincore(
                chunk.base.add(slot * SLOT_BYTES).cast(),
                SLOT_BYTES,
                pages.as_mut_ptr(),
            )
        };
        assert_eq!(result, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn of_many_slots_given_back_a_few_keep_their_pages() {
        let pool = RingPool::default();
        let mut slots: Vec<Slot> = (0..FREE_KEPT_MAX * 2).map(|_| pool.take().unwrap()).collect();
        for slot in &mut slots {
            // SAFETY: the slices are gone at the end of this turn.
            let (receive, send) = unsafe { slot.slices() };
            (receive[0], send[0]) = (1, 1);
        }
        drop(slots);
        let pool = pool.lock();
        let kept: usize = pool
            .free
            .iter()
            .map(|(chunk, slot)| resident(&pool.chunks[*chunk], *slot))
            .sum();
        // A page of each ring.
        assert!(kept <= 2 * (FREE_KEPT_MAX + CHUNK_SLOTS), "{kept}");
    }
}
