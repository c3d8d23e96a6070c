//! Deadlines, named by what happens when they fire.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::engine::Time;

/// When to ...
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timer {
    /// ... look at a flow: retransmit, refuse, give up, expire or end it with its grant.
    Flow(usize),
    /// ... report counts, refusals and status.
    Report,
    /// ... let the gateway's DNS refuse or forget queries.
    Dns,
    /// ... end bindings whose time is over.
    Bindings,
}

/// The table of deadlines. An entry may be out of date: whoever it is for finds nothing to do.
#[derive(Default)]
pub struct Timers(BinaryHeap<Reverse<(Time, Timer)>>);

impl Timers {
    /// Sets a deadline.
    pub fn set(&mut self, at: Time, timer: Timer) {
        self.0.push(Reverse((at, timer)));
    }

    /// The earliest deadline.
    pub fn next(&self) -> Option<Time> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes a deadline that has come.
    pub fn due(&mut self, now: Time) -> Option<Timer> {
        let Reverse((at, timer)) = self.0.peek().copied()?;
        (at <= now).then(|| {
            self.0.pop();
            timer
        })
    }

    /// Deadlines set.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
