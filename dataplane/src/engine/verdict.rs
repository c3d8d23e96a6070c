//! What the session says: verdicts, holds, revocations, cuts.

use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{
    CommandId, Epoch, FlowId, Guard, LookupSubject, Match, Miss, MissId, Protocol, Subject, Verdict,
    VerdictAction,
};

use crate::engine::cache::{Decision, Standing};
use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::held::HeldMiss;
use crate::engine::ip::Ip;
use crate::engine::judge::{Wanted, unspeakable};
use crate::engine::reply::{self, TcpHeader, Unreachable};
use crate::engine::{Engine, Time};
use crate::message::{FlowEnd, MissEnd, Order, Report};

impl Engine {
    /// Does what the session orders.
    pub fn handle_order(&mut self, now: Time, order: Order) {
        self.clock = now;
        match order {
            Order::Verdict(verdict) => self.handle_verdict(now, &verdict),
            Order::Held { miss, hold } => self.handle_held(now, miss, hold),
            Order::Revoke { command, epoch } => {
                if self.cache.epoch() != Some(epoch) {
                    self.cache.revoke(epoch);
                }
                if let Some(command) = command {
                    self.report_done(command, 0);
                }
            }
            Order::Cut { command, flows } => {
                let cut = flows.into_iter().filter(|flow| self.cut_id(now, *flow)).count();
                self.report_done(command, cut);
            }
            Order::ReportVerdicts { command } => {
                let (verdicts, in_all) = self.cache.report(now, |address| self.names_of(now, address));
                self.report(Report::Verdicts {
                    vm: self.config.vm,
                    command,
                    verdicts,
                    in_all,
                });
            }
            Order::Lease { epoch, lease } => self.cache.renew(epoch, now + lease),
            Order::Settings(settings) => {
                self.held.hold = settings.hold;
                self.dns.set_hold(settings.lookup_hold);
                self.dns.set_treatment(&settings.dns);
                self.cache.loss_grace = settings.loss_grace;
                let close = settings.forwards_closed && !self.settings.forwards_closed;
                self.settings = settings;
                if close {
                    for at in self.flows.places() {
                        if self.flows.get(at).is_some_and(|f| f.ingress) {
                            self.cut(now, at, FlowEnd::Cut);
                        }
                    }
                    self.cut_targeted(now);
                }
            }
            Order::GuardsChanged => {
                self.cache.clear();
                self.synthetics.forget_judged();
                self.cut_closed(now);
            }
            Order::Limit { grant, limit } => self.handle_limit(now, &grant, limit),
            Order::WayChanged => self.handle_way_changed(),
        }
    }

    /// Cuts what goes, or waits to go, where a daemon listens: a listener takes connections before it is told of.
    fn cut_closed(&mut self, now: Time) {
        for at in self.flows.places() {
            if self.flows.get(at).is_some_and(|flow| {
                !flow.ingress && self.standing(&flow.wanted()).guards.contains(Guard::Daemon)
            }) {
                self.cut(now, at, FlowEnd::Cut);
            }
        }
    }

    fn handle_verdict(&mut self, now: Time, verdict: &Verdict) {
        let in_force = self.cache.epoch();
        if !in_force.is_some_and(|epoch| verdict.epoch.stands_under(epoch)) {
            // Too old to act on: ask again, under the same id.
            self.ask_again(now, verdict.miss);
            return;
        }
        if self.names_moved_on(now, verdict) {
            self.ask_again(now, verdict.miss);
            return;
        }
        // What no longer waits is taken for unguarded and nobody's: else it would be a miss again.
        let mut standing = Standing::default();
        // What is said of an address that a synthetic one was resolved to is for that flow alone.
        let mut once = verdict.once;
        let flow_key = match self.held.get(verdict.miss) {
            Some(HeldMiss::Flows { flows, .. }) => {
                let covered = match &verdict.found {
                    Match::Flow(found) => flows
                        .first()
                        .and_then(|at| self.flows.get(*at))
                        .is_some_and(|flow| found.matches(&flow.key)),
                    Match::Lookup(_) | Match::Alias(_) => false,
                };
                if !covered {
                    // A verdict that does not cover what it answers decides nothing.
                    return;
                }
                let first = flows.first().and_then(|at| self.flows.get(*at));
                if let Some(flow) = first {
                    let wanted = flow.wanted();
                    standing = self.standing(&wanted);
                    once |= self.is_synthetic(&wanted) && !self.is_unresolved(&wanted);
                }
                first.map(|flow| flow.key.judged())
            }
            Some(HeldMiss::Lookup { name, .. }) => {
                if !matches!(&verdict.found, Match::Lookup(found) if found.matches(name)) {
                    return;
                }
                None
            }
            Some(HeldMiss::Alias { name, .. }) => {
                if !matches!(&verdict.found, Match::Alias(found) if found.matches(name)) {
                    return;
                }
                None
            }
            None => None,
        };
        let Some(meter) = self.meter_of(now, &verdict.grant, verdict.budget) else {
            // What cannot be counted is not let through: it ends at its deadline.
            return;
        };
        let decision = Arc::new(Decision::new(now, verdict, standing, meter));
        if once || decision.once {
            self.answer_once(now, verdict.miss, &decision);
            return;
        }
        self.cache.install(verdict, &decision, flow_key.as_ref());
        self.answer(now, verdict.miss, &decision);
        if !is_exact(&verdict.found) {
            for miss in self.held.covered_by(&verdict.found) {
                if !self.stands_so(miss, standing) {
                    continue;
                }
                self.report(Report::MissEnded {
                    miss,
                    end: MissEnd::Covered,
                });
                self.answer(now, miss, &decision);
            }
        }
    }

    /// Whether a verdict rests on names that are no longer those bound to the address. What no longer waits
    /// cannot be compared, and is not taken.
    fn names_moved_on(&self, now: Time, verdict: &Verdict) -> bool {
        let Match::Flow(found) = &verdict.found else {
            return false;
        };
        if !found.names_consulted {
            return false;
        }
        match self.held.get(verdict.miss) {
            Some(HeldMiss::Flows { target, names, .. }) => self.names_of(now, target.peer.ip()) != *names,
            _ => true,
        }
    }

    /// Whether everything that waits for a miss stands exactly so.
    fn stands_so(&self, miss: MissId, standing: Standing) -> bool {
        let Some(HeldMiss::Flows { flows, .. }) = self.held.get(miss) else {
            return true;
        };
        flows
            .iter()
            .filter_map(|at| self.flows.get(*at))
            .all(|flow| self.standing(&flow.wanted()) == standing)
    }

    /// Acts on everything that waits for a miss.
    fn answer(&mut self, now: Time, miss: MissId, decision: &Arc<Decision>) {
        match self.held.take(miss) {
            Some(HeldMiss::Flows { flows, .. }) => {
                for at in flows {
                    self.answer_flow(now, at, decision, miss);
                }
            }
            Some(HeldMiss::Lookup { name, .. }) => self.answer_name(now, &name, decision),
            Some(HeldMiss::Alias { name, .. }) => self.answer_alias(now, &name, decision),
            None => {}
        }
    }

    /// Acts on the flow that came first; the others ask anew.
    fn answer_once(&mut self, now: Time, miss: MissId, decision: &Arc<Decision>) {
        match self.held.take(miss) {
            Some(HeldMiss::Flows { flows, .. }) => {
                let mut flows = flows.into_iter();
                if let Some(first) = flows.next() {
                    self.answer_flow(now, first, decision, miss);
                }
                for at in flows {
                    self.hold_again(now, at);
                }
            }
            Some(HeldMiss::Lookup { name, .. }) => self.answer_name(now, &name, decision),
            Some(HeldMiss::Alias { name, .. }) => self.answer_alias(now, &name, decision),
            None => {}
        }
    }

    pub(super) fn hold_again(&mut self, now: Time, at: usize) {
        let Some(flow) = self.flows.get(at) else { return };
        let wanted = flow.wanted();
        if self.is_synthetic(&wanted) && !self.is_unresolved(&wanted) {
            // What the first of them was told may hold for it as well.
            self.judge_found(now, at);
            return;
        }
        match self.held.join_flow(wanted.target(), at) {
            Some((miss, count, hold)) => {
                if let Some((waits_for, _)) = self.flows.get_mut(at).and_then(|flow| flow.state.held_mut()) {
                    *waits_for = miss;
                }
                self.ask_flow(now, miss, &wanted, count, hold);
            }
            None => {
                self.count_drop(DropReason::HeldLimit);
                self.refuse_held(now, at, FlowEnd::Evicted);
            }
        }
    }

    /// An allow was for one connection of a grant that counts them, and is not used: the controlplane need not keep
    /// the connection set aside for it. `miss` is the one that it answered.
    pub(super) fn give_back(&mut self, decision: &Decision, miss: Option<MissId>, end: MissEnd) {
        if let Some(miss) = miss
            && decision.once
            && decision.meter.is_some()
        {
            self.report(Report::MissEnded { miss, end });
        }
    }

    fn answer_flow(&mut self, now: Time, at: usize, decision: &Arc<Decision>, miss: MissId) {
        let Some(flow) = self.flows.get(at) else { return };
        let wanted = flow.wanted();
        if matches!(flow.state, State::Reading(_)) {
            self.answer_reading(now, at, decision);
            // It was told as opened before, and is counted once.
            self.give_back(decision, Some(miss), MissEnd::Covered);
            return;
        }
        let unspeakable = unspeakable(&wanted, decision);
        if let Some(refused) = &unspeakable {
            // The controlplane has not decided this, and knows nothing of it yet.
            self.tally(now, &wanted, refused);
        }
        if unspeakable.is_some() {
            self.give_back(decision, Some(miss), MissEnd::Evicted);
        }
        let decision = unspeakable.as_ref().unwrap_or(decision);
        if decision.action == VerdictAction::Allow && self.is_synthetic(&wanted) {
            if self.is_unresolved(&wanted) {
                self.resolve(now, at, decision, Some(miss));
            } else {
                // The flow rests on what was said of its name.
                self.give_back(decision, Some(miss), MissEnd::Covered);
                self.handle_judged(now, at, decision);
            }
            return;
        }
        match (decision.action, wanted.key.protocol, wanted.neighbour) {
            (VerdictAction::Allow, _, Some(neighbour)) => {
                self.open_held_switched(now, at, neighbour, decision, miss);
            }
            (VerdictAction::Allow, Protocol::Tcp, None) => self.dial_held(now, at, decision, Some(miss)),
            (VerdictAction::Allow, _, None) => self.open_held(now, at, decision, Some(miss)),
            (VerdictAction::Deny, ..) => {
                self.count_drop(DropReason::Denied);
                self.refuse_held(now, at, FlowEnd::Cut);
            }
            (VerdictAction::Drop, ..) => {
                self.count_drop(DropReason::Denied);
                self.end_flow(at, FlowEnd::Cut);
            }
        }
    }

    /// Refuses a held flow so that the guest sees it at once. Its miss may be answered already.
    pub(super) fn refuse_held(&mut self, now: Time, at: usize, end: FlowEnd) {
        let Some(flow) = self.flows.get(at) else { return };
        if matches!(flow.state, State::Reading(_)) {
            self.cut(now, at, end);
            return;
        }
        let State::Held(waiting) = &flow.state else { return };
        let packet = if flow.key.protocol == Protocol::Tcp {
            waiting.packets.first().cloned().unwrap_or_default()
        } else {
            waiting.quote.clone()
        };
        let is_tcp = flow.key.protocol == Protocol::Tcp;
        if is_tcp {
            if let Ok(ip) = Ip::parse(&packet)
                && let Some(header) = TcpHeader::parse(ip.payload())
            {
                reply::reset(&mut self.transmit, ip.source, ip.destination, &header);
            }
        } else {
            let guest = flow.key.guest.ip();
            let gateway = self.gateway_towards(guest);
            reply::unreachable(
                &mut self.transmit,
                gateway,
                guest,
                &packet,
                Unreachable::Prohibited,
            );
        }
        self.end_flow(at, end);
    }

    /// Refuses a held flow that may open by a decision, for which there is no room.
    pub(super) fn refuse_beyond_limit(
        &mut self,
        now: Time,
        at: usize,
        decision: &Decision,
        miss: Option<MissId>,
    ) {
        // Of one that waited for its name to be looked up, its end says it.
        let is_said = self.flows.get(at).is_some_and(|flow| flow.opened_by.is_some());
        if !is_said {
            self.give_back(decision, miss, MissEnd::Evicted);
        }
        self.count_drop(DropReason::FlowLimit);
        self.refuse_held(now, at, FlowEnd::Evicted);
    }

    fn handle_held(&mut self, now: Time, miss: MissId, hold: Duration) {
        if let Some(HeldMiss::Lookup { name, .. }) = self.held.get(miss) {
            let name = name.clone();
            self.extend_lookup(now, &name, hold);
            return;
        }
        for at in self.held.extend(miss, hold).to_vec() {
            if let Some(flow) = self.flows.get_mut(at)
                && let Some((_, deadline)) = flow.state.held_mut()
            {
                *deadline = now + hold;
                // The timer that is set may be for the old deadline, which was earlier or later.
                flow.scheduled = None;
                self.schedule(now, at);
            }
        }
    }

    /// Sends a miss about a flow.
    pub(super) fn ask_flow(
        &mut self,
        now: Time,
        miss: MissId,
        wanted: &Wanted,
        count: usize,
        hold: Duration,
    ) {
        let subject = self.subject(now, wanted);
        self.held.note_names(miss, &subject.names);
        let subject = Subject::Flow(subject);
        let held = u32::try_from(count).unwrap_or(u32::MAX);
        self.report(Report::Miss(Miss {
            id: miss,
            vm: self.config.vm,
            subject,
            hold,
            held,
        }));
    }

    fn ask_again(&mut self, now: Time, miss: MissId) {
        match self.held.get(miss) {
            Some(HeldMiss::Flows { flows, hold, .. }) => {
                let (count, hold) = (flows.len(), *hold);
                let Some(flow) = flows.first().and_then(|at| self.flows.get(*at)) else {
                    return;
                };
                let wanted = flow.wanted();
                self.ask_flow(now, miss, &wanted, count, hold);
            }
            Some(HeldMiss::Lookup { name, query_type }) => {
                let subject = LookupSubject::new(name.clone(), *query_type);
                self.ask_lookup(miss, subject);
            }
            Some(HeldMiss::Alias { name, query_type }) => {
                let subject = LookupSubject::alias(name.clone(), *query_type);
                self.ask_lookup(miss, subject);
            }
            None => {}
        }
    }

    pub(super) fn ask_lookup(&mut self, miss: MissId, subject: LookupSubject) {
        self.report(Report::Miss(Miss {
            id: miss,
            vm: self.config.vm,
            subject: Subject::Lookup(subject),
            hold: self.settings.lookup_hold,
            held: 1,
        }));
    }

    /// Cuts a flow by its id. False when there is none.
    /// What the session asked for with a command is done, and cut so many flows.
    pub fn report_done(&mut self, command: CommandId, cut: usize) {
        self.report(Report::Done {
            vm: self.config.vm,
            command,
            cut: cut as u64,
        });
    }

    fn cut_id(&mut self, now: Time, id: FlowId) -> bool {
        let Some(at) = self.flows.find_id(id) else {
            return false;
        };
        self.cut(now, at, FlowEnd::Cut);
        true
    }

    /// Cuts a flow: both sides see it.
    pub(super) fn cut(&mut self, now: Time, at: usize, end: FlowEnd) {
        if matches!(self.flows.get(at).map(|f| &f.state), Some(State::Held(_))) {
            self.refuse_held(now, at, end);
            return;
        }
        self.reset_guest(now, at);
        self.end_flow(at, end);
    }

    /// The epoch in force.
    pub fn epoch(&self) -> Option<Epoch> {
        self.cache.epoch()
    }
}

fn is_exact(found: &Match) -> bool {
    match found {
        Match::Flow(found) => found.is_one_address() && found.ports.first() == found.ports.last(),
        Match::Lookup(found) | Match::Alias(found) => {
            matches!(found, vnet_proto::model::LookupMatch::Exact(_))
        }
    }
}
