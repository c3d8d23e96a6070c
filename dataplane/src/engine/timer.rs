//! Deadlines, named by what happens when they fire.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::engine::Time;

/// When to ...
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// ... look at a flow: retransmit, refuse, give up, expire or end it with its grant.
    Flow(usize),
    /// ... report counts, refusals and status.
    Report,
    /// ... let the gateway's DNS refuse or forget queries.
    Dns,
    /// ... end bindings whose time is over.
    Bindings,
    /// ... tell what was used of budgets, and cut what rests on those that are used up.
    Budgets,
    /// ... advertise the gateway as a router.
    Advertise,
}

/// Room for so many deadlines is kept when it is not used.
const KEPT_MAX: usize = 4_096;

/// The table of deadlines. An entry may be out of date: whoever it is for finds nothing to do.
#[derive(Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Time, Timer)>>);

impl Timers {
    /// Sets a deadline.
    pub(super) fn set(&mut self, at: Time, timer: Timer) {
        self.0.push(Reverse((at, timer)));
    }

    /// Throws out deadlines of flows that are out of date, when there are more of them than of `flows`. A place that
    /// is taken again and again would leave one behind each time, for as long as packets are held.
    pub(super) fn prune(&mut self, flows: usize, is_set: impl Fn(usize, Time) -> bool) {
        if self.0.len() <= KEPT_MAX + 2 * flows {
            return;
        }
        let mut set = std::mem::take(&mut self.0).into_vec();
        set.retain(|Reverse((at, timer))| match timer {
            Timer::Flow(flow) => is_set(*flow, *at),
            _ => true,
        });
        // Of flows that had a place after each other in one moment, deadlines may be the same.
        set.sort_unstable();
        set.dedup();
        set.shrink_to(KEPT_MAX);
        self.0 = set.into();
    }

    /// Deadlines in the table, out of date or not.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The earliest deadline.
    pub(super) fn next(&self) -> Option<Time> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes a deadline that has come.
    pub(super) fn due(&mut self, now: Time) -> Option<Timer> {
        let Reverse((at, timer)) = self.0.peek().copied()?;
        (at <= now).then(|| {
            self.0.pop();
            // A flood leaves many; most are out of date soon.
            if self.0.capacity() > KEPT_MAX && self.0.len() < self.0.capacity() / 4 {
                self.0.shrink_to(self.0.len() * 2);
            }
            timer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_in_order_and_a_flood_leaves_no_room_behind() {
        let mut timers = Timers::default();
        for at in (0..50_000).rev() {
            timers.set(Time::from_micros(at), Timer::Flow(0));
        }
        for _ in 0..50_000 {
            let next = timers.next();
            assert_eq!(timers.due(Time::MAX), Some(Timer::Flow(0)));
            assert!(next <= timers.next() || timers.next().is_none());
        }
        assert_eq!(timers.due(Time::MAX), None);
        assert!(timers.0.capacity() <= KEPT_MAX, "{}", timers.0.capacity());
    }
}
