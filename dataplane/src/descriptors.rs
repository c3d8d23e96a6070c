//! The descriptors of the process, and how guests share them.
//!
//! A process may have so many descriptors (RLIMIT_NOFILE), and each flow of a guest to the host's network
//! costs one. Some are kept back for what must go on whatever guests do: the session's next dial, a guest
//! that attaches, connections that a forward has accepted ([`RESERVE_MAX`]). The rest is the guests', by
//! these rules:
//!
//! - A guest's *share* is what each would have if there were one guest more than there are.
//! - A guest below its share has what it asks for while anything is free.
//! - A guest at or above it may use what is free beyond the *headroom*, which is kept for those below.
//! - When the headroom begins to be used, the guest that has most makes way: it gives up its longest idle
//!   flows until the headroom is whole again. There always is one above its share then, since the headroom
//!   is no larger than a share.
//!
//! So a guest alone has nearly everything, and one that comes later, or asks for little, is not refused
//! for what another has taken. Counts only; opening and closing are their owners', who keep a
//! [`Descriptor`] for exactly as long as what it stands for.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vnet_proto::model::VmId;

/// Descriptors kept back at most; a quarter of a small limit, and never less than [`RESERVE_MIN`].
pub const RESERVE_MAX: usize = 1_024;
/// Descriptors kept back at least: what the dataplane itself has open, and one guest more.
pub const RESERVE_MIN: usize = 64;
/// Descriptors of a guest beside its flows: its link, its poller, what wakes it, and one to spare.
pub const PER_GUEST: usize = 4;
/// Descriptors of a forward: its listener, and the copy that a guest reads.
pub const PER_FORWARD: usize = 2;
/// Flows that a guest can have at the least limit with which a dataplane starts.
pub const FLOWS_MIN: usize = 32;
/// The headroom is this part of what guests share, for two guests' links at least, and never above a share.
const HEADROOM_PART: usize = 16;

/// The limit of open files is below what was asked for needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the limit of open files is {limit}, too low for {}{} (at least {needed}); raise it: ulimit -n {needed}, or \
     LimitNOFILE={needed} in a systemd unit",
    if *links == 1 { "a VM".to_owned() } else { format!("a VM at each of {links} sockets") },
    match forwards {
        0 => String::new(),
        1 => " and 1 forwarded port".to_owned(),
        more => format!(" and {more} forwarded ports"),
    }
)]
pub struct TooFew {
    /// The process's limit.
    pub limit: usize,
    /// The least with which all that was asked for is served.
    pub needed: usize,
    /// Where guests attach.
    pub links: usize,
    /// Forwards.
    pub forwards: usize,
}

/// Whether so many descriptors are enough for a guest at each of the links, with [`FLOWS_MIN`] flows, and for
/// the forwards.
///
/// # Errors
/// [`TooFew`].
pub fn check(limit: usize, links: usize, forwards: usize) -> Result<(), TooFew> {
    let room = links * PER_GUEST + forwards * PER_FORWARD + FLOWS_MIN;
    let needed = (room + RESERVE_MIN)
        .max((room * 4).div_ceil(3))
        .min(room + RESERVE_MAX);
    if limit < needed {
        return Err(TooFew {
            limit,
            needed,
            links,
            forwards,
        });
    }
    Ok(())
}

/// The process's limit of open files, which is raised as far as the host permits.
pub fn raise_limit() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let limit = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => hard,
            Err(error) => {
                tracing::debug!(%error, "the limit of descriptors stays");
                soft
            }
        },
        Ok((soft, _)) => soft,
        Err(error) => {
            tracing::warn!(%error, limit = LIMIT_ASSUMED, "the limit of descriptors is not known");
            LIMIT_ASSUMED
        }
    };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// No descriptor is left for a guest or forward.
#[derive(Debug, thiserror::Error)]
#[error("{taken} of {room} descriptors are taken; raise the limit of open files (ulimit -n, LimitNOFILE=)")]
pub struct NoDescriptor {
    taken: usize,
    room: usize,
}

/// Every descriptor of the process. Clones share it.
#[derive(Clone)]
pub struct Descriptors(Arc<Mutex<Pool>>);

struct Pool {
    /// Kept back.
    reserve: usize,
    /// All others.
    room: usize,
    /// Taken by what is no flow: guests' links, forwards.
    fixed: usize,
    /// Taken by flows.
    used: usize,
    /// The same by guest; each that is attached has an entry.
    guests: BTreeMap<VmId, usize>,
    /// A guest has been asked to make way and has not yet done so.
    asked: Option<VmId>,
}

/// One guest's part in them. Clones are the same guest's; when the last is gone, and everything that was
/// taken through them, the guest no longer counts.
#[derive(Clone)]
pub struct Share(Arc<Member>);

struct Member {
    pool: Descriptors,
    vm: VmId,
}

/// One descriptor of a flow, given back when it is dropped.
pub struct Descriptor(Share);

/// Descriptors of what is no flow, given back when it is dropped.
pub struct Kept {
    pool: Descriptors,
    count: usize,
}

/// What came of asking for a descriptor.
#[derive(Debug)]
pub struct Taken {
    /// `None`: refused.
    pub descriptor: Option<Descriptor>,
    /// This guest is to give up so many flows, and to say [`Share::made_way`] then.
    pub makes_way: Option<(VmId, usize)>,
}

impl Descriptors {
    /// Of a process that may have so many.
    pub fn new(limit: usize) -> Self {
        let reserve = (limit / 4).clamp(RESERVE_MIN, RESERVE_MAX);
        Self(Arc::new(Mutex::new(Pool {
            reserve,
            room: limit.saturating_sub(reserve),
            fixed: 0,
            used: 0,
            guests: BTreeMap::new(),
            asked: None,
        })))
    }

    /// A guest attaches.
    ///
    /// # Errors
    /// [`NoDescriptor`]: guests and forwards that are there already take all that is not kept back.
    pub fn attach(&self, vm: VmId) -> Result<Share, NoDescriptor> {
        let mut pool = self.lock();
        pool.take_fixed(PER_GUEST)?;
        pool.guests.insert(vm, 0);
        drop(pool);
        Ok(Share(Arc::new(Member {
            pool: self.clone(),
            vm,
        })))
    }

    /// Descriptors of a forward.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn keep_forward(&self) -> Result<Kept, NoDescriptor> {
        self.lock().take_fixed(PER_FORWARD)?;
        Ok(Kept {
            pool: self.clone(),
            count: PER_FORWARD,
        })
    }

    /// Descriptors that are kept back.
    pub fn reserve(&self) -> usize {
        self.lock().reserve
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// What all guests' flows may have together.
    fn capacity(&self) -> usize {
        self.room.saturating_sub(self.fixed)
    }

    fn free(&self) -> usize {
        self.capacity().saturating_sub(self.used)
    }

    fn share(&self) -> usize {
        self.capacity() / (self.guests.len() + 1)
    }

    fn headroom(&self) -> usize {
        // A guest that attaches takes its link from it.
        (self.capacity() / HEADROOM_PART)
            .max(2 * PER_GUEST)
            .min(self.share())
    }

    fn take_fixed(&mut self, count: usize) -> Result<(), NoDescriptor> {
        if self.fixed + count > self.room {
            let (taken, room) = (self.fixed, self.room);
            return Err(NoDescriptor { taken, room });
        }
        self.fixed += count;
        Ok(())
    }

    /// The guest that has most, above its share, and how many it is to give up for the headroom to be
    /// whole. One at a time is asked.
    fn debtor(&mut self) -> Option<(VmId, usize)> {
        let (free, headroom, share) = (self.free(), self.headroom(), self.share());
        if free >= headroom || self.asked.is_some() {
            return None;
        }
        let (vm, most) = self.guests.iter().max_by_key(|(_, used)| **used)?;
        let (vm, above) = (*vm, most.saturating_sub(share));
        if above == 0 {
            return None;
        }
        self.asked = Some(vm);
        Some((vm, above.min(headroom - free)))
    }
}

impl Share {
    /// Asks for one descriptor more.
    pub fn take(&self) -> Taken {
        let mut pool = self.0.pool.lock();
        let own = pool.guests.get(&self.0.vm).copied().unwrap_or(0);
        let (free, below) = (pool.free(), own < pool.share());
        let granted = free > if below { 0 } else { pool.headroom() };
        if granted {
            pool.used += 1;
            *pool.guests.entry(self.0.vm).or_default() += 1;
        }
        let makes_way = if below { pool.debtor() } else { None };
        drop(pool);
        Taken {
            descriptor: granted.then(|| Descriptor(self.clone())),
            makes_way,
        }
    }

    /// This guest has given up what it was asked for, as far as it had it.
    pub fn made_way(&self) {
        self.0.pool.lock().has_made_way(self.0.vm);
    }
}

impl Pool {
    fn has_made_way(&mut self, vm: VmId) {
        if self.asked == Some(vm) {
            self.asked = None;
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        let mut pool = self.0.0.pool.lock();
        pool.used -= 1;
        if let Some(own) = pool.guests.get_mut(&self.0.0.vm) {
            *own -= 1;
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut pool = self.pool.lock();
        pool.guests.remove(&self.vm);
        pool.fixed -= PER_GUEST;
        pool.has_made_way(self.vm);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.pool.lock().fixed -= self.count;
    }
}

impl From<NoDescriptor> for io::Error {
    fn from(error: NoDescriptor) -> Self {
        io::Error::other(error)
    }
}

impl fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pool = self.lock();
        f.debug_struct("Descriptors")
            .field("capacity", &pool.capacity())
            .field("used", &pool.used)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Share").field(&self.0.vm).finish()
    }
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Descriptor").field(&self.0.0.vm).finish()
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kept").field(&self.count).finish()
    }
}

/// Where the system does not say: what POSIX systems give at least.
const LIMIT_ASSUMED: nix::sys::resource::rlim_t = 256;

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1_024;
    const ROOM: usize = LIMIT - LIMIT / 4;

    /// As many as it is given, and whoever was asked to make way last.
    fn take_all(share: &Share) -> (Vec<Descriptor>, Option<(VmId, usize)>) {
        let (mut all, mut asked) = (Vec::new(), None);
        loop {
            let taken = share.take();
            asked = asked.or(taken.makes_way);
            match taken.descriptor {
                Some(descriptor) => all.push(descriptor),
                None => return (all, asked),
            }
        }
    }

    #[test]
    fn a_guest_alone_has_nearly_everything_and_a_reserve_is_kept() {
        let all = Descriptors::new(LIMIT);
        let share = all.attach(VmId(1)).unwrap();
        let (held, asked) = take_all(&share);
        let capacity = ROOM - PER_GUEST;
        assert_eq!(held.len(), capacity - capacity / HEADROOM_PART);
        assert_eq!(asked, None);
        assert_eq!(all.reserve(), LIMIT / 4);
        drop(held);
        assert!(share.take().descriptor.is_some(), "given back");
    }

    #[test]
    fn one_that_comes_later_is_served_and_whoever_has_most_makes_way() {
        let all = Descriptors::new(LIMIT);
        let hog = all.attach(VmId(1)).unwrap();
        let (mut held, _) = take_all(&hog);
        let late = all.attach(VmId(2)).unwrap();
        let mut served = Vec::new();
        let share = (ROOM - 2 * PER_GUEST) / 3;
        while served.len() < share {
            let taken = late.take();
            served.push(taken.descriptor.expect("a guest below its share is refused"));
            if let Some((vm, count)) = taken.makes_way {
                assert_eq!(vm, VmId(1));
                assert!(count > 0 && count <= held.len());
                assert!(late.take().makes_way.is_none(), "one is asked at a time");
                held.truncate(held.len() - count);
                hog.made_way();
                assert!(hog.take().descriptor.is_none(), "it does not take it back");
            }
        }
        assert!(
            held.len() >= share,
            "nobody makes way below its share: {}",
            held.len()
        );
    }

    #[test]
    fn nobody_is_asked_where_nobody_is_above_its_share() {
        let all = Descriptors::new(LIMIT);
        let shares: Vec<_> = (1..=40).map(|vm| all.attach(VmId(vm)).unwrap()).collect();
        let fair = (ROOM - 40 * PER_GUEST) / 41;
        let mut held = Vec::new();
        for _ in 0..fair {
            for share in &shares {
                let taken = share.take();
                assert!(taken.makes_way.is_none());
                held.push(taken.descriptor.expect("room for everybody's share"));
            }
        }
        assert!(all.lock().free() >= fair, "and for one guest more");
    }

    #[test]
    fn guests_and_forwards_are_counted_and_refused_at_the_limit() {
        let all = Descriptors::new(RESERVE_MIN + PER_GUEST + PER_FORWARD);
        let share = all.attach(VmId(1)).unwrap();
        let kept = all.keep_forward().unwrap();
        let error = all.attach(VmId(2)).unwrap_err().to_string();
        assert!(
            error.starts_with("6 of 6 descriptors are taken; raise"),
            "{error}"
        );
        assert!(all.keep_forward().is_err());
        assert!(share.take().descriptor.is_none(), "nothing is left for flows");
        drop(kept);
        let flow = share.take().descriptor.expect("room again");
        drop(share);
        assert!(all.attach(VmId(2)).is_err(), "its flow is still there");
        drop(flow);
        all.attach(VmId(2)).unwrap();
    }

    #[test]
    fn the_limit_that_is_asked_for_is_enough_and_the_least() {
        for (links, forwards) in [
            (1, 0),
            (1, 1),
            (3, 40),
            (256, 0),
            (2, 1_024),
            (40, 60),
            (300, 1_024),
        ] {
            let refused = check(0, links, forwards).unwrap_err();
            let opens_all = |limit| {
                let all = Descriptors::new(limit);
                let kept: Vec<_> = (0..forwards).map_while(|_| all.keep_forward().ok()).collect();
                let shares: Vec<_> = (1..=u32::try_from(links).unwrap())
                    .map_while(|vm| all.attach(VmId(vm)).ok())
                    .collect();
                kept.len() == forwards && shares.len() == links && all.lock().free() >= FLOWS_MIN
            };
            let needed = refused.needed;
            assert_eq!(check(needed, links, forwards), Ok(()));
            assert!(opens_all(needed), "{refused:?}");
            assert_eq!(check(needed - 1, links, forwards).unwrap_err().needed, needed);
            // A quarter is kept back, in whole numbers.
            assert!(!opens_all(needed - 2), "{refused:?}");
        }
        assert_eq!(
            check(64, 1, 1).unwrap_err().to_string(),
            "the limit of open files is 64, too low for a VM and 1 forwarded port (at least 102); raise it: \
             ulimit -n 102, or LimitNOFILE=102 in a systemd unit"
        );
    }

    #[test]
    fn a_limit_below_the_reserve_gives_guests_nothing() {
        assert!(Descriptors::new(RESERVE_MIN).attach(VmId(1)).is_err());
    }
}
