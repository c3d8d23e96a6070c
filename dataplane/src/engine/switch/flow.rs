//! Flows between two guests that are not both open: let through one by one, and terminated nowhere.
//!
//! The guest that opens a flow owns it: its engine asks for the verdict, reports the flow, counts it, and
//! ends it by its clocks, its limits or a cut. The other guest's engine learns of it with the first packet,
//! and keeps an entry by which it knows the answers: what its guest sends between the same two ends passes,
//! and nothing else does.
//!
//! | what happens | at the opener | at the target |
//! | --- | --- | --- |
//! | a verdict allows it | in the table, reported; its packets go over | - |
//! | the first packet arrives | - | an entry, or at a limit a refusal |
//! | it is cut, idle, evicted, or its grant ends | its guest sees RST; reported | told so: its guest sees RST |
//! | the target cannot keep it | told so: its guest sees RST; reported | refused |
//! | either guest goes away | as cut | as cut |
//!
//! What a guest sends is in `sending.rs`, what comes to it in `receiving.rs`; here is what both ends
//! keep, and how it is over. The permit is closed before anybody is told, so that nothing passes while the
//! word is on its way.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{FlowId, Protocol, VmId};

use crate::engine::flow::{Flow, State};
use crate::engine::ip::Ip;
use crate::engine::reply::{self, ICMP, ICMPV6, TCP, TcpHeader};
use crate::engine::switch::ends::About;
use crate::engine::switch::permit::Permit;
use crate::engine::switch::track::{Sender, Stage, Track};
use crate::engine::tcp::TCP_IDLE;
use crate::engine::{ECHO_IDLE, Engine, Event, Time, datagram};
use crate::message::{FlowEnd, Report};

/// Flows that all other guests together may have open to one guest.
pub const TARGETED_MAX: usize = 4_096;
/// Flows that one other guest may have open to one guest, so that no guest shuts out the others.
pub const TARGETED_BY_ONE_MAX: usize = 1_024;
/// How long a connection between guests may be half open (RFC 5382 REQ-5: at least 4 minutes).
pub const OPENING_IDLE: Duration = Duration::from_secs(240);
/// How long the last segments of a connection between guests may still pass after its end: what is on its
/// way, and what is repeated because it was lost.
pub const LINGER: Duration = Duration::from_secs(2);

/// A flow between two guests, as the engine of one of them keeps it.
pub struct Switched {
    /// The other guest.
    pub(super) neighbour: VmId,
    pub(super) permit: Arc<Permit>,
    pub(super) role: Role,
    /// For TCP.
    pub(super) track: Track,
    /// When its last segment had passed, for TCP.
    over_since: Option<Time>,
}

/// Which end of a flow between two guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Its guest opened it, and this engine owns it.
    Opener,
    /// Its guest is the destination.
    Target,
}

/// How many flows other guests have open to this one.
#[derive(Default)]
pub(in crate::engine) struct Targeted {
    all: usize,
    by_guest: BTreeMap<VmId, usize>,
}

impl Switched {
    pub(super) fn new(neighbour: VmId, permit: Arc<Permit>, role: Role) -> Self {
        Self {
            neighbour,
            permit,
            role,
            track: Track::default(),
            over_since: None,
        }
    }

    /// Whether this engine's guest opened it.
    pub(in crate::engine) fn is_opener(&self) -> bool {
        self.role == Role::Opener
    }

    /// When it ends by itself; `None` at the target, which is told.
    pub(in crate::engine) fn deadline(
        &self,
        protocol: Protocol,
        last_active: Time,
        bytes_down: u64,
    ) -> Option<Time> {
        if self.role == Role::Target {
            return None;
        }
        let idle = match (protocol, self.track.stage()) {
            (Protocol::Udp, _) => datagram::udp_idle(bytes_down),
            (Protocol::Icmp | Protocol::Icmpv6, _) => ECHO_IDLE,
            (Protocol::Tcp, Stage::Opening) => OPENING_IDLE,
            (Protocol::Tcp, Stage::Open) => TCP_IDLE,
            (Protocol::Tcp, Stage::Over(_)) => return Some(self.over_since.unwrap_or(last_active) + LINGER),
        };
        Some(last_active + idle)
    }

    /// What its end is called when its time is over.
    pub(in crate::engine) fn end_by_time(&self) -> FlowEnd {
        match self.track.stage() {
            Stage::Over(end) => end,
            Stage::Opening | Stage::Open => FlowEnd::Idle,
        }
    }

    fn observe(&mut self, now: Time, sender: Sender, header: &TcpHeader) {
        self.track.observe(sender, header);
        if let Stage::Over(_) = self.track.stage() {
            self.over_since.get_or_insert(now);
        }
    }
}

impl Targeted {
    pub(super) fn has_room(&self, by: VmId) -> bool {
        self.all < TARGETED_MAX && self.by_guest.get(&by).is_none_or(|n| *n < TARGETED_BY_ONE_MAX)
    }

    pub(super) fn enter(&mut self, by: VmId) {
        self.all += 1;
        *self.by_guest.entry(by).or_default() += 1;
    }

    pub(super) fn leave(&mut self, by: VmId) {
        if let Some(count) = self.by_guest.get_mut(&by) {
            self.all -= 1;
            *count -= 1;
            if *count == 0 {
                self.by_guest.remove(&by);
            }
        }
    }
}

impl Engine {
    pub(super) fn switched(&self, at: usize) -> Option<&Switched> {
        match &self.flows.get(at)?.state {
            State::Switched(switched) => Some(switched),
            _ => None,
        }
    }

    /// Whether a flow may go on. One that the other end has closed is ended here, before the word of it is.
    pub(super) fn is_permitted(&mut self, at: usize) -> bool {
        let open = self.switched(at).is_some_and(|s| s.permit.is_open());
        if !open {
            self.end_flow(at, FlowEnd::Unreachable);
        }
        open
    }

    pub(super) fn observe(&mut self, now: Time, at: usize, sender: Sender, header: &TcpHeader) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        flow.last_active = now;
        if let State::Switched(switched) = &mut flow.state {
            let before = switched.track.stage();
            switched.observe(now, sender, header);
            // Its deadline comes nearer only with its end.
            if switched.track.stage() != before {
                self.schedule(now, at);
            }
        }
    }

    /// Queues the RST that the guest will believe, for a connection that is not over. One that the switch
    /// carries by itself by now, since both guests have become open, goes on without its flow.
    pub(in crate::engine) fn reset_switched(&mut self, at: usize) {
        let Some(flow) = self.flows.get(at) else { return };
        if flow
            .neighbour
            .is_some_and(|vm| self.is_switched_to(flow.key.peer.ip(), vm))
        {
            return;
        }
        let (State::Switched(switched), Protocol::Tcp) = (&flow.state, flow.key.protocol) else {
            return;
        };
        let (guest, peer) = (flow.key.guest, flow.key.peer);
        if let Some((sequence, acknowledgement)) = switched.track.reset_to_guest() {
            reply::abort(&mut self.transmit, peer, guest, sequence, acknowledgement);
        }
    }

    /// A flow between guests is out of the table: nothing of it passes any more, and the other end hears so.
    pub(in crate::engine) fn end_switched(&mut self, flow: &Flow, switched: &Switched, end: FlowEnd) {
        let to = switched.neighbour;
        match switched.role {
            Role::Opener => {
                if switched.permit.close_at_opener() {
                    self.tell_closed(&switched.permit, to, end);
                }
                self.report(Report::FlowClosed {
                    flow: flow.id,
                    end,
                    bytes_up: flow.bytes_up,
                    bytes_down: flow.bytes_down,
                    refusal: None,
                });
            }
            Role::Target => {
                let told = match end {
                    FlowEnd::Cut => FlowEnd::Cut,
                    _ => FlowEnd::Unreachable,
                };
                self.targeted.leave(to);
                if switched.permit.close_at_target() {
                    self.tell_closed(&switched.permit, to, told);
                }
            }
        }
    }

    pub(super) fn tell_closed(&mut self, permit: &Permit, to: VmId, end: FlowEnd) {
        let flow = permit.flow();
        self.events.push_back(Event::PermitClosed { to, flow, end });
    }

    /// The other end of a flow closed its permit.
    pub fn handle_permit_closed(&mut self, now: Time, flow: FlowId, end: FlowEnd) {
        self.clock = now;
        if let Some(at) = self.flows.find_id(flow)
            && self.switched(at).is_some()
        {
            self.reset_switched(at);
            self.end_flow(at, end);
        }
    }

    /// Another guest is gone, and with it every flow from and to it.
    pub fn handle_guest_gone(&mut self, now: Time, vm: VmId) {
        self.clock = now;
        self.end_where(now, FlowEnd::Unreachable, |flow| flow.neighbour == Some(vm));
    }

    /// This guest gave an address back: it is nobody's end of a flow any more.
    pub(in crate::engine) fn end_switched_of(&mut self, now: Time, address: IpAddr) {
        self.end_where(now, FlowEnd::Unreachable, |flow| {
            matches!(flow.state, State::Switched(_)) && flow.key.guest.ip() == address
        });
    }

    /// Forwards into this guest are closed, and so are other guests' flows.
    pub(in crate::engine) fn cut_targeted(&mut self, now: Time) {
        self.end_where(
            now,
            FlowEnd::Cut,
            |flow| matches!(&flow.state, State::Switched(s) if s.role == Role::Target),
        );
    }

    fn end_where(&mut self, now: Time, end: FlowEnd, which: impl Fn(&Flow) -> bool) {
        for at in self.flows.places() {
            if self.flows.get(at).is_some_and(&which) {
                self.cut(now, at, end);
            }
        }
    }
}

pub(super) fn tcp_header(ip: &Ip<'_>) -> Option<TcpHeader> {
    (ip.protocol == TCP)
        .then(|| TcpHeader::parse(ip.payload()))
        .flatten()
}

/// What a packet carries of a flow, bytes: payload of TCP and UDP, whole echo messages, nothing for errors.
pub(super) fn carried_bytes(ip: &Ip<'_>) -> usize {
    let payload = ip.payload();
    match ip.protocol {
        TCP => {
            let header_bytes = payload.get(12).map_or(0, |b| usize::from(b >> 4) * 4);
            payload.len().saturating_sub(header_bytes)
        }
        ICMP | ICMPV6 if About::sent(ip).is_none_or(|about| about.is_error) => 0,
        ICMP | ICMPV6 => payload.len(),
        _ => payload.len().saturating_sub(8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_other_guests_together_have_a_limit_and_what_leaves_makes_room() {
        let mut targeted = Targeted::default();
        let guests = u32::try_from(TARGETED_MAX / TARGETED_BY_ONE_MAX).unwrap();
        for by in 0..guests {
            for _ in 0..TARGETED_BY_ONE_MAX {
                assert!(targeted.has_room(VmId(by)));
                targeted.enter(VmId(by));
            }
            assert!(!targeted.has_room(VmId(by)));
        }
        assert!(!targeted.has_room(VmId(guests)), "all together");
        targeted.leave(VmId(0));
        assert!(targeted.has_room(VmId(0)) && targeted.has_room(VmId(guests)));
        assert!(!targeted.has_room(VmId(1)));
        for _ in 1..TARGETED_BY_ONE_MAX {
            targeted.leave(VmId(0));
        }
        targeted.leave(VmId(0));
        assert_eq!(targeted.all, TARGETED_MAX - TARGETED_BY_ONE_MAX);
        assert!(
            !targeted.by_guest.contains_key(&VmId(0)),
            "nothing is kept of who has none"
        );
    }
}
