//! What a guest sends to another: a flow opens, a packet of it is handed over, an answer goes back.

use std::net::IpAddr;
use std::sync::Arc;

use vnet_proto::model::{MissId, VmId};

use crate::engine::cache::Decision;
use crate::engine::flow::{Flow, State};
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;
use crate::engine::judge::Wanted;
use crate::engine::reply::{ICMP, ICMPV6, TcpHeader, Unreachable};
use crate::engine::switch::ends::About;
use crate::engine::switch::flow::{Role, Switched, carried_bytes, tcp_header};
use crate::engine::switch::permit::Permit;
use crate::engine::switch::track::{Sender, Stage};
use crate::engine::switch::{Packet, Passed};
use crate::engine::{Engine, Event, Outcome, Time};
use crate::message::{FlowEnd, MissEnd};

impl Engine {
    /// A new flow to another guest is allowed: its packet is passed on.
    pub(in crate::engine) fn open_switched<'a>(
        &mut self,
        now: Time,
        ip: &Ip<'a>,
        wanted: Wanted,
        neighbour: VmId,
        decision: Arc<Decision>,
    ) -> Outcome<'a> {
        let id = self.next_flow_id();
        let switched = Switched::new(neighbour, Permit::new(id), Role::Opener);
        let mut flow = Flow::new(id, now, wanted, State::Switched(Box::new(switched)));
        flow.decision = Some(decision);
        let at = self.insert(flow);
        self.report_opened(now, at, None);
        self.note_sent(now, at, ip);
        self.schedule(now, at);
        Outcome::Pass {
            flow: at,
            packet: ip.packet,
        }
    }

    /// Lets a held flow to another guest go on, if the address is still that guest's.
    pub(in crate::engine) fn open_held_switched(
        &mut self,
        now: Time,
        at: usize,
        neighbour: VmId,
        decision: &Arc<Decision>,
        miss: MissId,
    ) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let State::Held(waiting) = &mut flow.state else {
            return;
        };
        let packets = std::mem::take(&mut waiting.packets);
        let (protocol, address) = (flow.key.protocol, flow.key.peer.ip());
        if self.owner_of(address) != Some(neighbour) {
            if let Some(ip) = packets.first().and_then(|p| Ip::parse(p).ok()) {
                self.refuse_unreachable(&ip, Unreachable::Host);
            }
            self.count_drop(DropReason::UnknownStation);
            self.give_back(decision, Some(miss), MissEnd::Evicted);
            self.end_flow(at, FlowEnd::Unreachable);
            return;
        }
        // One answer may let many held flows go on at once; the limits hold for them too.
        self.evict_beyond_limit(protocol);
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let switched = Switched::new(neighbour, Permit::new(flow.id), Role::Opener);
        flow.state = State::Switched(Box::new(switched));
        flow.decision = Some(Arc::clone(decision));
        flow.last_active = now;
        self.enter_kind(at);
        self.report_opened(now, at, Some(miss));
        for packet in &packets {
            if let Ok(ip) = Ip::parse(packet) {
                self.note_sent(now, at, &ip);
            }
        }
        self.events.push_back(Event::Pass { flow: at, packets });
        self.schedule(now, at);
    }

    fn note_sent(&mut self, now: Time, at: usize, ip: &Ip<'_>) {
        if let Some(header) = tcp_header(ip) {
            self.observe(now, at, Sender::Guest, &header);
        }
    }

    /// The guest that has an address now.
    pub(in crate::engine) fn owner_of(&self, address: IpAddr) -> Option<VmId> {
        self.surroundings.neighbour(address).map(|n| n.vm)
    }

    /// A segment of this guest on a flow to or from another one. `None` when there is no such flow any more:
    /// the segment stands for itself.
    pub(in crate::engine) fn pass_segment<'a>(
        &mut self,
        now: Time,
        at: usize,
        ip: &Ip<'a>,
        header: &TcpHeader,
    ) -> Result<Option<Outcome<'a>>, DropReason> {
        let Some((role, track)) = self.switched(at).map(|s| (s.role, s.track)) else {
            return Ok(None);
        };
        if !self.is_permitted(at) {
            return Ok(None);
        }
        if header.is_syn() {
            // A connection of its own between the same two ends is possible once this one is forgotten.
            if role == Role::Target {
                return Err(DropReason::GuestToGuest);
            }
            // Any other SYN on a live connection comes from a guest that was started anew.
            if !track.is_repeated(header) || matches!(track.stage(), Stage::Over(_)) {
                self.end_flow(at, FlowEnd::GuestReset);
                return Ok(None);
            }
        }
        self.observe(now, at, Sender::Guest, header);
        Ok(Some(Outcome::Pass {
            flow: at,
            packet: ip.packet,
        }))
    }

    /// A datagram or echo request of this guest on a flow to or from another one; as [`Self::pass_segment`].
    pub(in crate::engine) fn pass_datagram<'a>(
        &mut self,
        now: Time,
        at: usize,
        ip: &Ip<'a>,
    ) -> Result<Option<Outcome<'a>>, DropReason> {
        let Some(role) = self.switched(at).map(|s| s.role) else {
            return Ok(None);
        };
        if !self.is_permitted(at) {
            return Ok(None);
        }
        // Only the opener asks. Where the identifier is zero, question and answer have the same key.
        if matches!(ip.protocol, ICMP | ICMPV6) && role == Role::Target {
            return Err(DropReason::GuestToGuest);
        }
        if let Some(flow) = self.flows.get_mut(at) {
            flow.last_active = now;
        }
        Ok(Some(Outcome::Pass {
            flow: at,
            packet: ip.packet,
        }))
    }

    /// ICMP other than a question: an answer to another guest's, or an error about what it sent, if it
    /// belongs to a flow that was let through.
    pub(in crate::engine) fn pass_answer<'a>(
        &mut self,
        now: Time,
        ip: &Ip<'a>,
    ) -> Result<Outcome<'a>, DropReason> {
        let About { key, is_error } = About::sent(ip).ok_or(DropReason::IpProtocol)?;
        let none = if self.is_guest_address(ip.destination) {
            DropReason::GuestToGuest
        } else {
            DropReason::IpProtocol
        };
        let at = self.flows.find(&key).ok_or(none)?;
        let role = self.switched(at).map(|s| s.role).ok_or(none)?;
        if (!is_error && role == Role::Opener) || !self.is_permitted(at) {
            return Err(none);
        }
        if let Some(flow) = self.flows.get_mut(at)
            && !is_error
        {
            flow.last_active = now;
        }
        Ok(Outcome::Pass {
            flow: at,
            packet: ip.packet,
        })
    }

    /// What to hand to which guest for a packet of [`Outcome::Pass`] or [`Event::Pass`].
    pub fn to_neighbour(&self, at: usize, packet: &[u8]) -> Option<(VmId, Passed)> {
        let switched = self.switched(at)?;
        let introduces = switched.role == Role::Opener && switched.permit.is_new();
        Some((
            switched.neighbour,
            Passed::Packet(Packet {
                from: self.config.vm,
                mac: self.mac?,
                permit: introduces.then(|| Arc::clone(&switched.permit)),
                bytes: packet.into(),
            }),
        ))
    }

    /// A packet of [`Outcome::Pass`] or [`Event::Pass`] was handed over.
    pub fn handle_handed_over(&mut self, now: Time, at: usize, packet: &[u8]) {
        let is_opener = self.switched(at).is_some_and(Switched::is_opener);
        if let (true, Ok(ip)) = (is_opener, Ip::parse(packet)) {
            let bytes = carried_bytes(&ip);
            if bytes != 0 {
                self.count_bytes(now, at, bytes, 0);
            }
        }
    }
}
