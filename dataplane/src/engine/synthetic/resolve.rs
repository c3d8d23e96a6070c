//! Flows to synthetic addresses: allowed by name, then looked up, judged again, dialled.
//!
//! A flow waits in state held all the while: for the verdict on its name, for the lookup, for the verdict on
//! what was found. Its `dialled` says how far it is: the synthetic address itself until the name is resolved.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{Guard, MissId, Name, Protocol, VerdictAction};

use crate::engine::cache::Decision;
use crate::engine::flow::{State, Waiting};
use crate::engine::frame::DropReason;
use crate::engine::gateway::dns::message::{Upstream, address_query};
use crate::engine::gateway::dns::{BINDING_TIME_MIN, Synthesis};
use crate::engine::ip::Ip;
use crate::engine::judge::Wanted;
use crate::engine::reply::Unreachable;
use crate::engine::synthetic::table::{Judged, Lookup, Place};
use crate::engine::{Engine, Event, Time};
use crate::message::{FlowEnd, MissEnd};

/// How long a flow waits for its name to be looked up, both families together.
pub(super) const RESOLVE_PATIENCE: Duration = Duration::from_secs(20);

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
/// Tells these lookups from those of the guest's.
const OWN_LOOKUP: u64 = 1 << 63;

impl Engine {
    /// What a lookup that is allowed is answered with: `None` is the upstream's answer.
    pub(in crate::engine) fn synthesize(
        &mut self,
        now: Time,
        name: &Name,
        synthetic_only: bool,
    ) -> Option<Synthesis> {
        if !self.settings.synthetic_answers && !synthetic_only {
            return None;
        }
        let flows = &self.flows;
        let told = self
            .synthetics
            .tell(now, name, |place| flows.has_synthetic(place));
        let Some((place, reused)) = told else {
            return Some(Synthesis::Exhausted);
        };
        if reused {
            self.cache.forget_address(place.v4().into());
            self.cache.forget_address(place.v6().into());
        }
        Some(Synthesis::Addresses {
            v4: place.v4(),
            v6: self.config.ipv6.is_some().then(|| place.v6()),
            only: synthetic_only,
        })
    }

    /// Whether a flow goes to a synthetic address whose name is not resolved yet.
    pub(in crate::engine) fn is_unresolved(&self, wanted: &Wanted) -> bool {
        wanted.dialled == wanted.key.peer && self.synthetics.find(wanted.key.peer.ip()).is_some()
    }

    /// Whether a flow goes to a synthetic address.
    pub(in crate::engine) fn is_synthetic(&self, wanted: &Wanted) -> bool {
        self.synthetics.find(wanted.key.peer.ip()).is_some()
    }

    /// Whether an address is one of the range that stands for no name.
    pub(in crate::engine) fn is_vacant(&self, address: IpAddr) -> bool {
        (self.settings.synthetic_answers || !self.synthetics.is_empty())
            && Place::of(address).is_some()
            && self.synthetics.find(address).is_none()
    }

    /// The names under which an address is judged.
    pub(in crate::engine) fn names_of(&self, now: Time, address: IpAddr) -> Vec<Name> {
        match self.synthetics.name_of(address) {
            Some(name) => vec![name.clone()],
            None => self.bindings.names_of(now, address),
        }
    }

    /// The first packet of a flow whose name a cached verdict allows: it waits for the lookup.
    pub(in crate::engine) fn open_unresolved(
        &mut self,
        now: Time,
        wanted: Wanted,
        packet: Box<[u8]>,
        quote: Box<[u8]>,
        decision: &Arc<Decision>,
    ) {
        let waiting = Waiting {
            miss: MissId(0),
            packets: vec![packet],
            quote,
            deadline: now,
            gives_up_at: None,
        };
        let at = self.new_flow(now, wanted, State::Held(waiting));
        self.resolve(now, at, decision, None);
    }

    /// A flow's name is allowed, by the miss if it was asked about: look it up.
    pub(in crate::engine) fn resolve(
        &mut self,
        now: Time,
        at: usize,
        decision: &Arc<Decision>,
        miss: Option<MissId>,
    ) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let State::Held(waiting) = &mut flow.state else {
            return;
        };
        waiting.deadline = now + RESOLVE_PATIENCE;
        waiting.gives_up_at = None;
        waiting.miss = MissId(0);
        flow.decision = Some(Arc::clone(decision));
        flow.opened_by = miss;
        flow.scheduled = None;
        let Some(place) = self.synthetics.find(flow.key.peer.ip()) else {
            return self.refuse_held(now, at, FlowEnd::Cut);
        };
        self.schedule(now, at);
        if self.synthetics.found(now, place).is_some() {
            return self.judge_found(now, at);
        }
        match self.synthetics.wait(place, at) {
            Some(true) => self.start_lookup(now, place, TYPE_A),
            Some(false) => {}
            None => {
                self.count_drop(DropReason::HeldLimit);
                self.refuse_held(now, at, FlowEnd::Evicted);
            }
        }
    }

    fn start_lookup(&mut self, now: Time, place: Place, query_type: u16) {
        let Some(descriptor) = self.take_descriptor() else {
            // As a name of which nothing is found.
            return self.settle(now, place, Vec::new(), now);
        };
        let started = self.synthetics.start(place, query_type);
        let query = started.and_then(|(number, name)| {
            // A name that is looked up for a connection carries as much out as one that the guest asks for.
            let query = self
                .dns
                .admits(now, &name, query_type)
                .then(|| address_query(&name, query_type))
                .flatten();
            if query.is_none() {
                self.synthetics.end(number);
            }
            Some((number, query?))
        });
        match query {
            Some((number, bytes)) => self.events.push_back(Event::Resolve {
                query: number | OWN_LOOKUP,
                bytes,
                descriptor,
            }),
            None => self.settle(now, place, Vec::new(), now),
        }
    }

    /// The answer to a lookup of ours. False if it is the guest's.
    pub(in crate::engine) fn handle_found(&mut self, now: Time, query: u64, answer: Option<&[u8]>) -> bool {
        if query & OWN_LOOKUP == 0 {
            return false;
        }
        let Some((Lookup { place, query_type }, name)) = self.synthetics.end(query & !OWN_LOOKUP) else {
            return true;
        };
        let (mut addresses, ttl) = answer
            .and_then(Upstream::read)
            .map(|upstream| upstream.addresses_of(&name))
            .unwrap_or_default();
        addresses.retain(|address| match query_type {
            TYPE_A => address.is_ipv4(),
            _ => address.is_ipv6(),
        });
        if addresses.is_empty() && query_type == TYPE_A {
            // Whether there is a way to what is found shows then: it need not be the default route.
            self.start_lookup(now, place, TYPE_AAAA);
        } else {
            let most = self.settings.dns.ttl_max;
            let until = now + ttl.clamp(BINDING_TIME_MIN.min(most), most);
            self.settle(now, place, addresses, until);
        }
        true
    }

    /// What a lookup of ours asks for; the outer `None` for the guest's.
    pub(in crate::engine) fn own_lookup(&self, query: u64) -> Option<Option<(Name, u16)>> {
        (query & OWN_LOOKUP != 0).then(|| self.synthetics.under_way(query & !OWN_LOOKUP))
    }

    /// The answer to a lookup of ours is not to be used: the flows that waited for it are refused. False if it is
    /// the guest's.
    pub(in crate::engine) fn settle_refused(&mut self, now: Time, query: u64, action: VerdictAction) -> bool {
        if query & OWN_LOOKUP == 0 {
            return false;
        }
        if let Some((Lookup { place, .. }, _)) = self.synthetics.end(query & !OWN_LOOKUP) {
            for at in self.synthetics.settle(place, Vec::new(), now) {
                self.count_drop(DropReason::Denied);
                match action {
                    VerdictAction::Drop => self.end_flow(at, FlowEnd::Cut),
                    VerdictAction::Allow | VerdictAction::Deny => self.refuse_held(now, at, FlowEnd::Cut),
                }
            }
        }
        true
    }

    fn settle(&mut self, now: Time, place: Place, addresses: Vec<IpAddr>, until: Time) {
        for at in self.synthetics.settle(place, addresses, until) {
            self.judge_found(now, at);
        }
    }

    /// A flow's name was looked up: what it stands for is judged, once for an epoch.
    pub(in crate::engine) fn judge_found(&mut self, now: Time, at: usize) {
        if !self.stands(now, at) {
            return self.ask_anew(now, at);
        }
        let Some(flow) = self.flows.get(at) else { return };
        let (key, ends_at) = (flow.key, flow.decision.as_ref().and_then(|d| d.expires_at));
        let place = self.synthetics.find(key.peer.ip());
        let found = place.and_then(|place| self.synthetics.found(now, place));
        let (Some(place), Some(addresses)) = (place, found) else {
            return self.refuse_unfound(at, Unreachable::Host);
        };
        let has_way = |address: &IpAddr| address.is_ipv4() || self.surroundings.has_way(*address);
        let Some(address) = addresses.into_iter().find(has_way) else {
            return self.refuse_unfound(at, Unreachable::Network);
        };
        // A name that stands for the guests' own network, loopback or multicast leads nowhere, as an
        // address would.
        if self.check_destination(address) != Ok(None) {
            return self.refuse_unfound(at, Unreachable::Host);
        }
        let dialled = self.dialled(SocketAddr::new(address, key.peer.port()));
        if key.protocol == Protocol::Icmp && dialled.is_ipv6() {
            // An echo request of the one family is none of the other.
            return self.refuse_unfound(at, Unreachable::Host);
        }
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        flow.dialled = dialled;
        let wanted = flow.wanted();
        if self.standing(&wanted).guards.contains(Guard::Daemon) {
            self.count_drop(DropReason::Denied);
            return self.refuse_held(now, at, FlowEnd::Cut);
        }
        let what = (key.protocol, key.peer.port(), dialled.ip());
        let epoch = self.cache.epoch();
        if self.synthetics.is_judged(now, place, what, epoch) {
            return self.go_on(now, at);
        }
        match self.held.join_flow(wanted.target(), at) {
            Some((miss, count, hold)) => {
                if let Some(flow) = self.flows.get_mut(at)
                    && let State::Held(waiting) = &mut flow.state
                {
                    waiting.miss = miss;
                    waiting.deadline = ends_at.map_or(now + hold, |ends| ends.min(now + hold));
                }
                self.ask_flow(now, miss, &wanted, count, hold);
            }
            None => {
                self.count_drop(DropReason::HeldLimit);
                self.refuse_held(now, at, FlowEnd::Evicted);
            }
        }
    }

    /// What a name was found to stand for may be dialled. Its verdict is for this alone; the flow rests on the
    /// one about its name.
    pub(in crate::engine) fn handle_judged(&mut self, now: Time, at: usize, judgement: &Decision) {
        let Some(flow) = self.flows.get(at) else { return };
        let judged = Judged {
            protocol: flow.key.protocol,
            port: flow.key.peer.port(),
            address: flow.dialled.ip(),
            epoch: judgement.epoch,
            until: judgement.expires_at,
        };
        if let Some(place) = self.synthetics.find(flow.key.peer.ip()) {
            self.synthetics.note_judged(place, judged);
        }
        if self.stands(now, at) {
            self.go_on(now, at);
        } else {
            self.ask_anew(now, at);
        }
    }

    fn go_on(&mut self, now: Time, at: usize) {
        let Some(flow) = self.flows.get(at) else { return };
        let Some(decision) = flow.decision.clone() else {
            return;
        };
        let miss = flow.opened_by;
        if flow.key.protocol == Protocol::Tcp {
            self.dial_held(now, at, &decision, miss);
        } else {
            self.open_held(now, at, &decision, miss);
        }
    }

    /// Whether the verdict on a flow's name is still one: it was for this flow alone, or the cache has it.
    fn stands(&self, now: Time, at: usize) -> bool {
        let Some(flow) = self.flows.get(at) else {
            return false;
        };
        let Some(decision) = &flow.decision else {
            return false;
        };
        if decision.once {
            // A later epoch does not take it back: what it would be taken back by, the second judgement meets.
            return self.cache.holds(now, decision) && decision.opens_until.is_none_or(|until| now < until);
        }
        let wanted = Wanted::plain(flow.key);
        self.cache
            .lookup(now, &flow.key, self.standing(&wanted))
            .is_some_and(|held| held.action == VerdictAction::Allow)
    }

    /// The verdict on a flow's name is void: it is a miss as it was at first.
    fn ask_anew(&mut self, now: Time, at: usize) {
        let hold = self.held.hold;
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        flow.dialled = flow.key.peer;
        let (decision, miss) = (flow.decision.take(), flow.opened_by.take());
        if let State::Held(waiting) = &mut flow.state {
            // As long as any other that is asked for now, not what was left of the time for the lookup.
            waiting.deadline = now + hold;
        }
        flow.scheduled = None;
        if let Some(decision) = decision {
            self.give_back(&decision, miss, MissEnd::HoldExpired);
        }
        self.schedule(now, at);
        self.hold_again(now, at);
    }

    /// There is nothing to dial.
    fn refuse_unfound(&mut self, at: usize, why: Unreachable) {
        self.count_drop(DropReason::HostRefused);
        let Some(flow) = self.flows.get(at) else { return };
        if let State::Held(waiting) = &flow.state {
            let quoted = match waiting.packets.first() {
                Some(syn) if waiting.quote.is_empty() => {
                    Ip::parse(syn).map(|ip| ip.quote().to_vec()).unwrap_or_default()
                }
                _ => waiting.quote.to_vec(),
            };
            let guest = flow.key.guest.ip();
            let gateway = self.gateway_towards(guest);
            crate::engine::reply::unreachable(&mut self.transmit, gateway, guest, &quoted, why);
        }
        self.end_flow(at, FlowEnd::Unreachable);
    }
}
