//! Budgets: what this guest may still do under a grant, and has done.
//!
//! A verdict that rests on a grant with a budget says how much the guest may use in all. The guest's use is
//! counted in one [`Meter`] for all flows that rest on the grant, whichever verdict let them through. When a
//! limit of bytes is reached, nothing more passes, and what rests on the grant is cut, by this engine's own
//! count and whether the controlplane hears of it or not. Connections are the controlplane's to count: a
//! verdict with such a limit is for one flow (`is_for_once`), so that nothing opens without it.
//!
//! What was used is told as a sum over the guest's life, so that a message that is lost or told twice makes no
//! difference. TCP passes no byte beyond a limit; of datagrams, the one that reaches it is the last.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use ahash::HashMap;
use vnet_proto::model::{Allowance, Budget};

use crate::engine::timer::Timer;
use crate::engine::{Engine, Time};
use crate::message::{FlowEnd, Report};

/// Grants with budgets that one guest's use is counted of. A verdict on one more is not acted on.
pub const METERS_MAX: usize = 1_024;
/// How long a yes may wait to be used where its grant's connections are counted: the controlplane sets one aside for a
/// minute with each, and has counted from when it said so.
pub const SET_ASIDE: Duration = Duration::from_secs(50);
/// How often use is told, while it changes.
const USE_INTERVAL: Duration = Duration::from_millis(250);

/// What one guest uses of one grant. Shared by the decisions that rest on it, all of one thread: nothing
/// here waits or is ordered.
#[derive(Debug)]
pub struct Meter {
    grant: String,
    connections: AtomicU64,
    up: Count,
    down: Count,
    /// It changed since it was told.
    untold: AtomicBool,
    /// The grant has ended. Flows that live on by another's word are not counted any more.
    is_over: AtomicBool,
}

#[derive(Debug)]
struct Count {
    used: AtomicU64,
    /// `u64::MAX`: none.
    limit: AtomicU64,
}

impl Count {
    fn unlimited() -> Self {
        Self {
            used: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
        }
    }

    fn left(&self) -> u64 {
        match self.limit.load(Relaxed) {
            u64::MAX => u64::MAX,
            limit => limit.saturating_sub(self.used.load(Relaxed)),
        }
    }

    fn set_limit(&self, limit: u64) {
        self.limit
            .store(if limit == 0 { u64::MAX } else { limit }, Relaxed);
    }
}

impl Meter {
    fn new(grant: &str) -> Self {
        Self {
            grant: grant.to_owned(),
            connections: AtomicU64::new(0),
            up: Count::unlimited(),
            down: Count::unlimited(),
            untold: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        }
    }

    fn set_limits(&self, limit: Budget) {
        self.up.set_limit(limit.bytes_up);
        self.down.set_limit(limit.bytes_down);
    }

    fn used(&self) -> Budget {
        Budget {
            connections: self.connections.load(Relaxed),
            bytes_up: self.up.used.load(Relaxed),
            bytes_down: self.down.used.load(Relaxed),
        }
    }

    /// Whether a limit of bytes is reached.
    pub(super) fn is_used_up(&self) -> bool {
        self.up.left() == 0 || self.down.left() == 0
    }

    fn add(&self, up: u64, down: u64) {
        self.up.used.fetch_add(up, Relaxed);
        self.down.used.fetch_add(down, Relaxed);
    }

    /// Notes that there is something to tell. True the first time since it was told.
    fn note(&self) -> bool {
        !self.is_over.load(Relaxed) && !self.untold.swap(true, Relaxed)
    }

    fn end(&self) {
        self.is_over.store(true, Relaxed);
        self.set_limits(Budget::default());
    }
}

/// What may pass on a flow now, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// From the guest.
    pub up: usize,
    /// To the guest.
    pub down: usize,
}

impl Room {
    /// Whatever there is.
    pub const ANY: Self = Self {
        up: usize::MAX,
        down: usize::MAX,
    };
}

/// The meters of one guest.
#[derive(Debug, Default)]
pub(super) struct Budgets {
    meters: HashMap<String, Arc<Meter>>,
    /// Those that have something to tell.
    untold: Vec<Arc<Meter>>,
    /// When the timer that is set fires.
    set: Option<Time>,
    /// Verdicts that found no room here.
    pub(super) refused: u64,
}

impl Budgets {
    /// The meter of a grant, with its limits as they are told now; `None` at the limit of meters.
    fn meter(&mut self, grant: &str, limit: Budget) -> Option<Arc<Meter>> {
        if let Some(meter) = self.meters.get(grant) {
            meter.set_limits(limit);
            return Some(Arc::clone(meter));
        }
        if self.meters.len() >= METERS_MAX {
            self.refused += 1;
            return None;
        }
        let meter = Arc::new(Meter::new(grant));
        meter.set_limits(limit);
        self.meters.insert(grant.to_owned(), Arc::clone(&meter));
        Some(meter)
    }
}

/// Whether a verdict with a budget is for the one flow that missed: its connections are limited.
pub(super) fn is_for_once(allowance: Option<Allowance>) -> bool {
    allowance.is_some_and(|a| a.left.connections != 0)
}

impl Engine {
    /// The meter of a verdict's budget. The inner `None` is no budget, the outer one no room.
    #[expect(clippy::option_option, reason = "no budget and no room are both ordinary")]
    pub(super) fn meter_of(
        &mut self,
        now: Time,
        grant: &str,
        allowance: Option<Allowance>,
    ) -> Option<Option<Arc<Meter>>> {
        let Some(allowance) = allowance else {
            return Some(None);
        };
        let meter = self.budgets.meter(grant, allowance.limit())?;
        self.check_budget(now, &meter);
        Some(Some(meter))
    }

    /// The session says anew how much may be used, or that the grant has ended and need not be counted.
    pub(super) fn handle_limit(&mut self, now: Time, grant: &str, limit: Option<Budget>) {
        let Some(limit) = limit else {
            if let Some(meter) = self.budgets.meters.remove(grant) {
                meter.end();
            }
            return;
        };
        let Some(meter) = self.budgets.meters.get(grant).cloned() else {
            return;
        };
        let waited = meter.is_used_up();
        meter.set_limits(limit);
        self.check_budget(now, &meter);
        if waited && !meter.is_used_up() {
            // Nothing else would wake them: their sockets have been ready all along.
            for at in self.flows.places() {
                if self.meter(at).is_some_and(|m| Arc::ptr_eq(m, &meter)) {
                    self.mark_dirty(at);
                }
            }
        }
    }

    /// Counts a flow that is about to open, and tells it at once, before the flow itself.
    pub(super) fn count_connection(&mut self, at: usize) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let Some(meter) = flow.decision.as_ref().and_then(|d| d.meter.clone()) else {
            return;
        };
        flow.metered = true;
        meter.connections.fetch_add(1, Relaxed);
        self.tell_uses(&[meter]);
    }

    /// Counts bytes of a flow under its grant's budget.
    pub(super) fn count_under_budget(&mut self, now: Time, at: usize, up: u64, down: u64) {
        let Some(meter) = self.meter(at).cloned() else {
            return;
        };
        meter.add(up, down);
        if meter.note() {
            self.budgets.untold.push(Arc::clone(&meter));
            self.want_budgets(now + USE_INTERVAL);
        }
        self.check_budget(now, &meter);
    }

    /// How much may pass on a flow now.
    pub fn room(&self, at: usize) -> Room {
        self.meter(at).map_or(Room::ANY, |meter| {
            let left = |count: &Count| usize::try_from(count.left()).unwrap_or(usize::MAX);
            // One limit that is reached ends the grant for both directions.
            if meter.is_used_up() {
                Room { up: 0, down: 0 }
            } else {
                Room {
                    up: left(&meter.up),
                    down: left(&meter.down),
                }
            }
        })
    }

    fn meter(&self, at: usize) -> Option<&Arc<Meter>> {
        let flow = self.flows.get(at).filter(|flow| flow.metered)?;
        flow.decision.as_ref()?.meter.as_ref()
    }

    /// What is used up is told and cut in a moment: not here, where its flows are at work.
    fn check_budget(&mut self, now: Time, meter: &Arc<Meter>) {
        if meter.is_used_up() {
            if meter.note() {
                self.budgets.untold.push(Arc::clone(meter));
            }
            self.want_budgets(now);
        }
    }

    fn want_budgets(&mut self, at: Time) {
        if self.budgets.set.is_none_or(|set| at < set) {
            self.budgets.set = Some(at);
            self.timers.set(at, Timer::Budgets);
        }
    }

    pub(super) fn handle_budgets_timeout(&mut self, now: Time) {
        // Only the timer that is set counts: one for later may have been drawn nearer.
        if self.budgets.set.is_none_or(|set| set > now) {
            return;
        }
        self.budgets.set = None;
        let untold = std::mem::take(&mut self.budgets.untold);
        // The controlplane hears of it before it is asked again.
        self.tell_uses(&untold);
        if untold.iter().any(|meter| meter.is_used_up()) {
            self.cut_used_up(now);
        }
    }

    fn cut_used_up(&mut self, now: Time) {
        for at in self.flows.places() {
            if self.meter(at).is_some_and(|meter| meter.is_used_up()) {
                self.cut(now, at, FlowEnd::GrantEnded);
            }
        }
    }

    /// Tells what was used of these grants so far.
    fn tell_uses(&mut self, meters: &[Arc<Meter>]) {
        let uses: Vec<(String, Budget)> = meters
            .iter()
            .inspect(|meter| meter.untold.store(false, Relaxed))
            .map(|meter| (meter.grant.clone(), meter.used()))
            .collect();
        if !uses.is_empty() {
            let vm = self.config.vm;
            self.report(Report::Uses { vm, uses });
        }
    }

    /// The last words of a guest that goes away.
    pub(super) fn tell_last_uses(&mut self) {
        let untold = std::mem::take(&mut self.budgets.untold);
        self.tell_uses(&untold);
    }
}
