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

/// The table of deadlines. An entry may be out of date: whoever it is for finds nothing to do.
#[derive(Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Time, Timer)>>);

impl Timers {
    /// Sets a deadline.
    pub(super) fn set(&mut self, at: Time, timer: Timer) {
        self.0.push(Reverse((at, timer)));
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
            timer
        })
    }
}
