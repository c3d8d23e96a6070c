//! Memory for TCP flows' rings: lazily touched, reused within one VM, given back when idle.
//!
//! Rings are large (a window must cover a burst) but most flows carry little. So they are virtual
//! memory: a flow that carries a few bytes touches one page of each ring, and one that carried much
//! gives its pages back once it is idle. A pool belongs to one VM, so that no bytes of one VM are
//! ever behind another's.

use std::sync::{Arc, Mutex, PoisonError};

use memmap2::MmapMut;

/// The ring for what the guest sent, bytes. Exactly `65535 << 2`: smoltcp books the unscaled window of
/// the SYN-ACK as if it were scaled, and a capacity beyond that can be made to panic by a guest.
pub const RECEIVE_BYTES: usize = 65_535 << 2;
/// The ring for what goes to the guest, bytes.
pub const SEND_BYTES: usize = 256 << 10;

const SLOT_BYTES: usize = 512 << 10;
const SEND_OFFSET: usize = 256 << 10;
const CHUNK_SLOTS: usize = 64;
/// Bytes of each ring that stay resident when a slot is given back: one request and answer.
const KEEP_BYTES: usize = 4096;

const _: () = assert!(RECEIVE_BYTES <= SEND_OFFSET && SEND_OFFSET + SEND_BYTES <= SLOT_BYTES);

/// Hands out ring memory for one VM.
#[derive(Clone, Default)]
pub struct RingPool(Arc<Mutex<Pool>>);

#[derive(Default)]
struct Pool {
    chunks: Vec<Arc<Chunk>>,
    free: Vec<(usize, usize)>,
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
}

impl RingPool {
    /// Memory for one flow; `None` when the system has no address space left.
    pub fn take(&self) -> Option<Slot> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        Some(Slot {
            pool: self.clone(),
            chunk: Arc::clone(&pool.chunks[at.0]),
            at,
        })
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
                std::slice::from_raw_parts_mut(base, RECEIVE_BYTES),
                std::slice::from_raw_parts_mut(base.add(SEND_OFFSET), SEND_BYTES),
            )
        }
    }

    /// Gives the pages of both rings back to the system but for the first of each. Only for rings
    /// that hold nothing: what was there reads as zero afterwards.
    pub fn shrink(&mut self) {
        let base = self.at.1 * SLOT_BYTES;
        for ring in [base, base + SEND_OFFSET] {
            // SAFETY: the bytes belong to this slot and its owner says that they hold nothing; private
            // anonymous memory reads as zero after this.
            let given_back = unsafe {
                self.chunk.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    ring + KEEP_BYTES,
                    SEND_OFFSET - KEEP_BYTES,
                )
            };
            debug_assert!(given_back.is_ok(), "{given_back:?}");
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .free
            .push(self.at);
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
}
