//! Budgets of grants: what verdicts may promise of them, what dataplanes tell of their use, and their ends.
//!
//! The account itself is [`crate::grant::Account`]. Here what VMs use comes in, what is left goes out to the
//! other VMs on the same budget, and a grant that is used up ends: at once when its bytes are, with the last
//! flow that rests on it when its connections are.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use vnet_proto::model::{Allowance, Budget, Malformed, Target, VmId};
use vnet_proto::v1;

use super::State;
use super::events::about_grant;
use crate::approval::MissRef;
use crate::clock::Now;
use crate::convert;
use crate::fleet::{self, DataplaneNo, LiveFlow};
use crate::grant::{Grant, GrantAction, GrantId, Lifetime, Reservation, Spending, VmInstance};
use crate::refusal::Refusal;
use crate::store::Write;

/// How often what was used is saved.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);

/// What is to be done about budgets, and what rests on grants.
#[derive(Debug, Default)]
pub(super) struct Budgets {
    /// Live flows that rest on each grant.
    resting: HashMap<String, u64>,
    /// Grants of which more is used than their VMs were told.
    changed: BTreeSet<GrantId>,
    /// Grants of which more is used than is saved.
    unsaved: BTreeSet<GrantId>,
    saved_at: Option<SystemTime>,
    /// Grants of an earlier life, and until when live flows that rest on them may still be told.
    untold: Option<(SystemTime, HashSet<GrantId>)>,
}

impl Budgets {
    /// The store kept a grant: dataplanes may come back with flows that rest on it until then.
    pub(super) fn await_flows(&mut self, until: SystemTime, id: GrantId) {
        let (_, grants) = self.untold.get_or_insert_with(|| (until, HashSet::new()));
        grants.insert(id);
    }

    /// Whether no live flow rests on a grant, as far as that can be known.
    fn is_idle(&self, id: &GrantId) -> bool {
        let untold = self
            .untold
            .as_ref()
            .is_some_and(|(_, grants)| grants.contains(id));
        !untold && !self.resting.contains_key(&id.0)
    }

    /// A flow is live.
    pub(super) fn add(&mut self, flow: &LiveFlow) {
        if !flow.grant.is_empty() {
            *self.resting.entry(flow.grant.clone()).or_default() += 1;
        }
    }

    /// A flow is not any more.
    pub(super) fn remove(&mut self, flow: &LiveFlow) {
        if let Some(count) = self.resting.get_mut(&flow.grant) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.resting.remove(&flow.grant);
            }
        }
    }
}

/// How a verdict is limited by its grant's budget.
#[derive(Debug, Default)]
pub(super) struct Issued {
    /// What the VM may use.
    pub(super) allowance: Option<Allowance>,
    /// It is for the miss alone.
    pub(super) once: bool,
}

impl State {
    /// What an allow for a VM may promise of its grant's budget. `None`: a limit of the controlplane is
    /// reached, and nothing may be promised.
    pub(super) fn issue(
        &mut self,
        now: Now,
        id: &GrantId,
        name: &str,
        miss: MissRef,
        is_flow: bool,
    ) -> Option<Issued> {
        let Some(vm) = self.fleet.vms.get(name) else {
            return Some(Issued::default());
        };
        let instance = vm.view.instance.clone();
        let Some(allowance) = self.grants.allowance(id, &instance) else {
            return Some(Issued::default());
        };
        let once = is_flow && self.grants.account(id).is_some_and(|a| a.limits_connections());
        if once && !self.grants.reserve(id, reservation(miss), now.steady) {
            return None;
        }
        Some(Issued {
            allowance: Some(allowance),
            once,
        })
    }

    /// It is known what came of the verdict on a miss.
    pub(super) fn release(&mut self, miss: MissRef) {
        self.grants.release(reservation(miss));
    }

    /// VMs of a dataplane tell what they have used.
    pub(super) fn handle_uses(
        &mut self,
        now: Now,
        number: DataplaneNo,
        uses: Vec<v1::GrantUse>,
    ) -> Result<(), Malformed> {
        for message in uses {
            let Some(dataplane) = self.fleet.dataplanes.get(&number) else {
                return Ok(());
            };
            let used = message.used.ok_or(Malformed::Missing {
                field: "grant_use.used",
            })?;
            // Also of one that is gone already: what it used is used.
            let instance = fleet::instance(&dataplane.boot_id, VmId(message.vm));
            let id = GrantId(message.grant_id);
            match self.grants.record_spending(&id, instance, used.into()) {
                Spending::Unknown => self.tell_ended(number, VmId(message.vm), &id),
                Spending::Nothing => {}
                Spending::Counted => self.note_spent(&id),
                Spending::LastConnection(grant) => {
                    self.note_spent(&id);
                    self.connections_used_up(now, &grant);
                }
                Spending::UsedUp(grant) => {
                    self.end_used_up(now, &grant, "its bytes are used up");
                }
            }
        }
        Ok(())
    }

    fn note_spent(&mut self, id: &GrantId) {
        self.budgets.changed.insert(id.clone());
        self.budgets.unsaved.insert(id.clone());
    }

    fn connections_used_up(&mut self, now: Now, grant: &Grant) {
        let text = format!(
            "grant {} ({} {}): its {} connections are used up; it ends with the last that is open",
            grant.id, grant.action, grant.target, grant.budget.connections
        );
        let event = about_grant(v1::EventKind::GrantUsedUp, grant, &self.fleet, text);
        self.event(now, event);
        // Lookups that it allowed are in caches.
        self.change(now, None, |vm| grant.reaches(&vm.view), "a grant is used up");
    }

    fn end_used_up(&mut self, now: Now, grant: &Grant, why: &str) {
        self.grant_ended(now, grant, why, "");
        self.change(now, None, |vm| grant.reaches(&vm.view), why);
    }

    /// What time brings: ends of grants whose last connection has ended, and word to VMs and to the store of
    /// what was used.
    pub(super) fn tick_budgets(&mut self, now: Now) {
        self.grants.expire_reservations(now.steady);
        self.budgets.untold.take_if(|(until, _)| *until <= now.steady);
        for id in self.grants.out_of_connections() {
            if self.budgets.is_idle(&id)
                && let Some(grant) = self.grants.remove(&id)
            {
                self.end_used_up(now, &grant, "its connections are used up, and the last has ended");
            }
        }
        let changed = std::mem::take(&mut self.budgets.changed);
        let closed = self.grants.take_closed();
        if !changed.is_empty() || !closed.is_empty() {
            let places = self.fleet.places();
            for id in &changed {
                self.tell_limits(id, &places);
            }
            for (id, vms) in closed {
                for (number, vm) in vms.iter().filter_map(|vm| fleet::place(&places, vm)) {
                    self.tell_ended(number, vm, &id);
                }
            }
        }
        let due = |at: SystemTime| at.checked_add(SAVE_INTERVAL).is_none_or(|at| at <= now.steady);
        if !self.budgets.unsaved.is_empty() && self.budgets.saved_at.is_none_or(due) {
            self.budgets.saved_at = Some(now.steady);
            self.save_spent();
        }
    }

    /// Leaves to the store what was used since it was last saved.
    pub(super) fn save_spent(&mut self) {
        for id in std::mem::take(&mut self.budgets.unsaved) {
            if let Some(grant) = self.grants.get(&id) {
                let stored = convert::to_store(grant, self.grants.account(&id));
                self.writes.push(Write::PutGrant(Box::new(stored)));
            }
        }
    }

    /// Tells every VM on a budget of bytes how much it may use, as the others have used of it.
    fn tell_limits(&mut self, id: &GrantId, places: &HashMap<String, DataplaneNo>) {
        let Some(account) = self.grants.account(id) else {
            return;
        };
        if account.vm_count() < 2 || !account.limits_bytes() {
            return;
        }
        let vms: Vec<VmInstance> = account.vms().map(|(vm, _)| vm.clone()).collect();
        for instance in vms {
            let place = fleet::place(places, &instance);
            let (Some((number, vm)), Some(allowance)) = (place, self.grants.allowance(id, &instance)) else {
                continue;
            };
            let limit = v1::BudgetLimit {
                vm: vm.0,
                grant_id: id.0.clone(),
                limit: Some(allowance.limit().into()),
                ended: false,
            };
            self.send(number, v1::session_response::Message::BudgetLimit(limit));
        }
    }

    fn tell_ended(&mut self, number: DataplaneNo, vm: VmId, id: &GrantId) {
        let ended = v1::BudgetLimit {
            vm: vm.0,
            grant_id: id.0.clone(),
            limit: None,
            ended: true,
        };
        self.send(number, v1::session_response::Message::BudgetLimit(ended));
    }

    /// Whether a flow may live on though its grant lets no further one through: it was for this very flow, or
    /// its connections are used up.
    pub(super) fn rests(&self, flow: &LiveFlow) -> bool {
        let id = GrantId(flow.grant.clone());
        flow.once
            || (self.grants.is_closed(&id)
                && self.grants.get(&id).is_some_and(|grant| {
                    let vm = self.fleet.vms.get(&flow.vm);
                    vm.is_some_and(|vm| grant.reaches(&vm.view))
                }))
    }

    /// A grant for the API, with what is used of its budget.
    pub(super) fn grant_message(&self, grant: &Grant) -> v1::Grant {
        convert::grant(grant, self.grants.account(&grant.id))
    }
}

/// Refuses a budget that would mean nothing, or could not be kept to its end.
pub(super) fn check(grant: &Grant) -> Result<(), Refusal> {
    let why = match (grant.action, &grant.target, grant.lifetime) {
        _ if grant.budget == Budget::default() => return Ok(()),
        (GrantAction::Deny, ..) => "is for what is allowed; a denial uses nothing (leave it out)",
        (
            _,
            Target::Name {
                lookup_only: true, ..
            },
            _,
        ) => "is of connections and their bytes, and a lookup has none (leave it out, or allow the name)",
        (_, Target::Forward(_), _) => "is of what a VM opens, and a forward is opened to it (leave it out)",
        (_, _, Lifetime::Once) => {
            "of a grant for once is one connection (leave it out, or give another lifetime)"
        }
        _ => return Ok(()),
    };
    Err(Refusal::field("budget", why))
}

fn reservation(miss: MissRef) -> Reservation {
    (miss.dataplane, miss.miss)
}
