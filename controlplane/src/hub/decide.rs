//! Decisions: a miss becomes a verdict, or joins a question.

use vnet_proto::model::{
    FlowMatch, LookupMatch, Match, Miss, MissId, Mode, NameDemand, Reason, Subject, Target, Verdict,
    VerdictAction,
};
use vnet_proto::v1;

use super::budgets::Issued;
use super::events::{about, about_grant, on_subject, outcome_of};
use super::repeats::Key;
use super::{State, ids};
use crate::approval::{Ask, AskOutcome, MissRef, OPEN_PER_VM_MAX, PendingId, Released};
use crate::clock::Now;
use crate::convert;
use crate::fleet::{DataplaneNo, Fleet, LiveFlow, Vm};
use crate::grant::{Grant, GrantId, Lifetime, Use};
use crate::policy::{
    Context, Decision, GuardedRanges, Outcome, PeerView, decide_flow, decide_live, decide_lookup,
};

/// Spent grants for once that are remembered.
const SPENT_MAX: usize = 4_096;

/// What is decided for a subject of a VM; `None` if the VM is not there.
pub(super) fn decide(fleet: &Fleet, vm: &str, subject: &Subject) -> Option<Decision<Match>> {
    let vm = fleet.vms.get(vm)?;
    let dataplane = fleet.dataplanes.get(&vm.dataplane)?;
    let peer = fleet.peer_of(vm.dataplane, subject);
    Some(decide_for(vm, &dataplane.guarded, peer, subject))
}

pub(super) fn decide_for(
    vm: &Vm,
    guarded: &GuardedRanges,
    peer: Option<&Vm>,
    subject: &Subject,
) -> Decision<Match> {
    let context = context(vm, guarded, peer);
    match subject {
        Subject::Flow(flow) => with_match(decide_flow(&context, flow), Match::Flow),
        Subject::Lookup(lookup) => with_match(decide_lookup(&context, lookup), |found| {
            Match::of_lookup(lookup, found)
        }),
    }
}

pub(super) fn context<'a>(vm: &'a Vm, guarded: &'a GuardedRanges, peer: Option<&'a Vm>) -> Context<'a> {
    Context {
        vm: &vm.view,
        policy: &vm.effective,
        grants: &vm.grants,
        guarded,
        peer: peer.map(|peer| PeerView {
            name: &peer.view.name,
            mode: peer.effective.mode(),
        }),
    }
}

fn with_match<M>(decision: Decision<M>, found: impl FnOnce(M) -> Match) -> Decision<Match> {
    Decision {
        outcome: decision.outcome,
        reason: decision.reason,
        found: found(decision.found),
        would_deny: decision.would_deny,
        grant: decision.grant,
        once: decision.once,
        budget: decision.budget,
        expires_at: decision.expires_at,
        name_demand: decision.name_demand,
        names: decision.names,
        synthetic_only: decision.synthetic_only,
        remedy: decision.remedy,
    }
}

impl State {
    /// A dataplane's cache does not answer.
    pub(super) fn handle_miss(&mut self, now: Now, number: DataplaneNo, miss: Miss) {
        self.metrics.misses.add(1);
        let name = self
            .fleet
            .dataplanes
            .get(&number)
            .and_then(|d| d.vms.get(&miss.vm));
        let Some(name) = name.cloned() else {
            self.metrics.stray.add(1);
            return;
        };
        self.refresh_grants(&name);
        let miss_ref = MissRef {
            dataplane: number,
            miss: miss.id,
        };
        if let Some(decision) = decide(&self.fleet, &name, &miss.subject) {
            self.carry_out(now, &name, miss_ref, miss.subject, miss.held, decision);
        }
    }

    /// A miss that no request holds any more. Of a VM whose dataplane is lost none can be answered, so
    /// none is asked anew and none spends a grant: what it still holds when it comes back, it
    /// announces again.
    pub(super) fn decide_released(&mut self, now: Now, released: Released) {
        let name = released.vm.name;
        let here = self
            .fleet
            .vms
            .get(&name)
            .is_some_and(|vm| vm.view.instance == released.vm.instance && !vm.lost);
        if !here {
            return;
        }
        self.refresh_grants(&name);
        if let Some(decision) = decide(&self.fleet, &name, &released.subject) {
            self.carry_out(now, &name, released.miss, released.subject, 1, decision);
        }
    }

    fn carry_out(
        &mut self,
        now: Now,
        name: &str,
        miss: MissRef,
        subject: Subject,
        packets: u32,
        decision: Decision<Match>,
    ) {
        let action = match decision.outcome {
            Outcome::Allow => VerdictAction::Allow,
            Outcome::Deny => VerdictAction::Deny,
            Outcome::Drop => VerdictAction::Drop,
            Outcome::Ask => return self.ask(now, name, miss, subject, packets, decision.reason),
        };
        let mut issued = Issued::default();
        if let Some(id) = &decision.grant {
            if action == VerdictAction::Allow {
                let is_flow = matches!(subject, Subject::Flow(_));
                issued = match self.issue(now, id, name, miss, is_flow) {
                    Some(issued) => issued,
                    None => {
                        let text = "too many connections await their opening under grants with budgets";
                        let reason = Reason::new("limit", "reserved", text);
                        return self.deny_once(now, name, miss, &subject, reason);
                    }
                };
            }
            let what = match subject {
                Subject::Flow(_) => Use::Flow,
                Subject::Lookup(_) => Use::Lookup,
            };
            self.use_grant(now, id, what);
        }
        // Of an alias the dataplane tells what came of it, by the name that was asked for.
        let is_alias = matches!(&subject, Subject::Lookup(lookup) if lookup.alias);
        if !is_alias {
            self.decided(
                now,
                name,
                &subject,
                decision.outcome,
                &decision.reason,
                1,
                decision.would_deny,
                false,
            );
        }
        let expires_in = decision
            .expires_at
            .map(|end| end.duration_since(now.steady).unwrap_or_default());
        self.send_verdict(miss, |epoch| Verdict {
            miss: miss.miss,
            action,
            found: decision.found,
            epoch,
            expires_in,
            once: decision.once || issued.once,
            budget: issued.allowance,
            grant: decision.grant.map(|g| g.0).unwrap_or_default(),
            reason: decision.reason,
            would_deny: decision.would_deny,
            name_demand: decision.name_demand,
            names: decision.names,
            synthetic_only: decision.synthetic_only,
        });
    }

    fn ask(&mut self, now: Now, name: &str, miss: MissRef, subject: Subject, packets: u32, reason: Reason) {
        self.last_request = self.last_request.wrapping_add(1);
        let Some(vm) = self.fleet.vms.get(name) else {
            return;
        };
        let said = vm.effective.settings();
        let timeout = vm.effective.approval_timeout();
        let hold = match &subject {
            Subject::Flow(_) => timeout,
            Subject::Lookup(_) => timeout.min(vm.lookup_hold),
        };
        let ask = Ask {
            id: PendingId(ids::spread(self.last_request)),
            vm: &vm.view,
            peer: self.peer_name(name, &subject),
            subject: subject.clone(),
            reason,
            miss,
            hold,
            packets,
            open_max: said.max_pending.map_or(OPEN_PER_VM_MAX, |most| most as usize),
            per_minute_max: said.max_per_minute.map(|most| most as usize),
        };
        let (outcome, changes) = self.pending.ask(now.steady, ask);
        match outcome {
            AskOutcome::Opened(id) | AskOutcome::Joined(id) => {
                if hold.is_zero() {
                    let text = format!(
                        "approvalTimeout is 0, so that nothing is held; request {id} awaits an answer for the \
                         next attempt"
                    );
                    let reason = Reason::new("approval", id.0, text);
                    self.deny_once(now, name, miss, &subject, reason);
                    return self.take_up(now, changes);
                }
                self.metrics.held.add(1);
                // Announced again after a reconnect, it keeps the time that it had.
                let until = self
                    .pending
                    .get(&id)
                    .and_then(|r| r.held.iter().rev().find(|h| h.miss == miss).map(|h| h.until));
                let hold = until.map_or(hold, |end| end.duration_since(now.steady).unwrap_or_default());
                self.send(
                    miss.dataplane,
                    v1::session_response::Message::Held(v1::Held {
                        miss_id: miss.miss.0,
                        pending_id: id.0,
                        hold: convert::span(hold),
                    }),
                );
            }
            AskOutcome::Refused {
                limit: _,
                count,
                reason,
            } => {
                let peer = self.peer_name(name, &subject);
                let text = outcome_of(&subject, &peer, &reason);
                let event = about(v1::EventKind::LimitReached, name, text);
                self.ask_refused(now, count, &reason, on_subject(event, &subject, &peer));
                self.deny_once(now, name, miss, &subject, reason);
            }
        }
        self.take_up(now, changes);
    }

    /// Nobody is asked, as a limit of requests is reached: counted, and told with the first of those in a row.
    pub(super) fn ask_refused(&mut self, now: Now, count: u64, reason: &Reason, event: v1::Event) {
        self.metrics.pending_refused.add(1);
        if count == 1 {
            self.repeated_event(now, Key::limit(&reason.text), 1, event);
        }
    }

    /// Denies a miss, and it alone: there may be room, or an answer, for the next.
    fn deny_once(&mut self, now: Now, name: &str, miss: MissRef, subject: &Subject, reason: Reason) {
        self.decided(now, name, subject, Outcome::Deny, &reason, 1, false, false);
        self.send_verdict(miss, |epoch| Verdict {
            miss: miss.miss,
            action: VerdictAction::Deny,
            found: exactly(subject),
            epoch,
            expires_in: None,
            once: true,
            budget: None,
            grant: String::new(),
            reason,
            would_deny: false,
            name_demand: NameDemand::Off,
            names: Vec::new(),
            synthetic_only: false,
        });
    }

    /// Records what became of a flow or lookup. Flows that were let through are recorded when they open.
    #[expect(clippy::too_many_arguments, reason = "each is a fact of one event")]
    pub(super) fn decided(
        &mut self,
        now: Now,
        name: &str,
        subject: &Subject,
        outcome: Outcome,
        reason: &Reason,
        count: u64,
        would_deny: bool,
        cached: bool,
    ) {
        let allowed = outcome == Outcome::Allow;
        let kind = match subject {
            Subject::Flow(_) if allowed => return,
            Subject::Flow(_) => v1::EventKind::FlowDenied,
            Subject::Lookup(_) if allowed => v1::EventKind::DnsAllowed,
            Subject::Lookup(_) => v1::EventKind::DnsDenied,
        };
        if let (Subject::Lookup(lookup), false) = (subject, allowed)
            && let Some(vm) = self.fleet.vms.get_mut(name)
        {
            vm.deny(
                lookup.name.clone(),
                lookup.query_type,
                reason.clone(),
                count,
                now.wall,
            );
        }
        if !allowed {
            tracing::debug!(target: "flow", vm = name, reason = %reason, cached, "denied");
        }
        let peer = self.peer_name(name, subject);
        let text = outcome_of(subject, &peer, reason);
        let event = on_subject(about(kind, name, text), subject, &peer);
        let event = v1::Event {
            action: convert::action(outcome).into(),
            reason: Some(reason.into()),
            would_deny,
            ..event
        };
        let key = Key::decided(kind, subject, reason, would_deny);
        self.repeated_event(now, key, count, event);
    }

    pub(super) fn use_grant(&mut self, now: Now, id: &GrantId, what: Use) {
        if let Some(ended) = self.grants.record_use(id, what, now.steady) {
            if self.spent.len() >= SPENT_MAX {
                self.spent.pop_front();
            }
            self.spent.push_back(id.clone());
            self.grant_ended(now, &ended, "it is used up", "");
        }
    }

    /// Counts a use of a grant that a cached verdict rests on.
    pub(super) fn count_cached_use(&mut self, now: Now, id: &str) {
        let id = GrantId(id.to_owned());
        if self.grants.get(&id).is_some_and(|g| g.lifetime != Lifetime::Once) {
            self.use_grant(now, &id, Use::Flow);
        }
    }

    /// The name of the other guest that a subject of a VM's is for; empty where that is none.
    pub(super) fn peer_name(&self, name: &str, subject: &Subject) -> String {
        let vm = self.fleet.vms.get(name);
        vm.and_then(|vm| self.fleet.peer_of(vm.dataplane, subject))
            .map(|peer| peer.view.name.clone())
            .unwrap_or_default()
    }

    /// Whether a live flow may live on.
    pub(super) fn is_allowed(&self, number: DataplaneNo, flow: &LiveFlow) -> bool {
        let Some(vm) = self.fleet.vms.get(&flow.vm) else {
            return false;
        };
        if flow.ingress {
            return !vm.effective.closes_forwards();
        }
        let Some(dataplane) = self.fleet.dataplanes.get(&number) else {
            return false;
        };
        let peer = flow
            .subject
            .peer_vm
            .and_then(|handle| self.fleet.vm_of(number, handle));
        let decision = decide_live(&context(vm, &dataplane.guarded, peer), &flow.subject);
        match decision.outcome {
            Outcome::Allow => decision.may_go_on(&flow.names),
            // Its grant was for this very flow: only what outranks any grant takes it back.
            Outcome::Ask => self.rests(flow),
            Outcome::Deny | Outcome::Drop => {
                let blocked = matches!(vm.effective.mode(), Some(Mode::Block | Mode::Quarantine));
                let step = decision.reason.step.as_str();
                self.rests(flow) && !blocked && !matches!(step, "mode" | "rule" | "grant")
            }
        }
    }

    /// Whether a grant was for once and is spent.
    pub(super) fn is_spent(&self, id: &str) -> bool {
        !id.is_empty() && self.spent.iter().rev().any(|spent| spent.0 == id)
    }

    /// Brings up to date what a VM is granted.
    pub(super) fn refresh_grants(&mut self, name: &str) {
        if let Some(vm) = self.fleet.vms.get_mut(name)
            && vm.grants.generation() != self.grants.generation()
        {
            vm.grants = self.grants.for_vm(&vm.view);
        }
    }

    /// Records the end of a grant, and forgets it in the store.
    pub(super) fn grant_ended(&mut self, now: Now, grant: &Grant, why: &str, actor: &str) {
        self.writes
            .push(crate::store::Write::DeleteGrant(grant.id.0.clone()));
        let text = format!(
            "grant {} ({} {}) ended: {why}",
            grant.id, grant.action, grant.target
        );
        let event = about_grant(v1::EventKind::GrantEnded, grant, &self.fleet, text);
        self.event(
            now,
            v1::Event {
                actor: actor.to_owned(),
                ..event
            },
        );
    }

    fn send_verdict(&mut self, miss: MissRef, make: impl FnOnce(vnet_proto::model::Epoch) -> Verdict) {
        let Some(dataplane) = self.fleet.dataplanes.get_mut(&miss.dataplane) else {
            return;
        };
        let verdict = make(dataplane.epoch);
        self.metrics.verdicts.add(1);
        dataplane.send(v1::session_response::Message::Verdict((&verdict).into()));
    }

    pub(super) fn send(&mut self, number: DataplaneNo, message: v1::session_response::Message) {
        if let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) {
            dataplane.send(message);
        }
    }

    /// A miss no longer waits.
    pub(super) fn handle_miss_ended(&mut self, now: Now, number: DataplaneNo, ended: v1::MissEnded) {
        use crate::approval::MissEnd;
        let end = match v1::MissEnd::try_from(ended.end) {
            Ok(v1::MissEnd::HoldExpired) => MissEnd::HoldExpired,
            Ok(v1::MissEnd::GuestGaveUp) => MissEnd::GuestGaveUp,
            Ok(v1::MissEnd::VmDown) => MissEnd::VmDown,
            Ok(v1::MissEnd::Evicted) => MissEnd::Evicted,
            Ok(v1::MissEnd::Covered) => MissEnd::Covered,
            Ok(v1::MissEnd::Unspecified) | Err(_) => {
                self.metrics.malformed.add(1);
                return;
            }
        };
        let miss = MissRef {
            dataplane: number,
            miss: MissId(ended.miss_id),
        };
        self.release(miss);
        let changes = self.pending.miss_ended(now.steady, miss, end);
        self.take_up(now, changes);
    }

    /// Ends what is bound to an attachment of a VM that is gone for good. Its name is another's to have.
    pub(super) fn instance_stopped(&mut self, now: Now, instance: &crate::grant::VmInstance, name: &str) {
        let changes = self.pending.vm_stopped(now.steady, instance);
        self.take_up(now, changes);
        let ended = self.grants.vm_stopped(instance);
        for grant in &ended {
            self.grant_ended(now, grant, "its VM stopped", "");
        }
        if ended
            .iter()
            .any(|grant| matches!(grant.target, Target::Forward(_)))
        {
            self.close_forwards(None, |_, _| true);
        }
        self.forget_attachment(instance, name);
    }
}

fn exactly(subject: &Subject) -> Match {
    match subject {
        Subject::Flow(flow) => Match::Flow(FlowMatch::exact(&flow.key)),
        Subject::Lookup(lookup) => Match::of_lookup(lookup, LookupMatch::Exact(lookup.name.clone())),
    }
}
