//! What comes to a guest from others: packets of flows that were let through, and nothing else.

use std::sync::Arc;

use vnet_proto::model::FlowKey;

use crate::engine::flow::{Flow, State};
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;
use crate::engine::judge::Wanted;
use crate::engine::reply::TCP;
use crate::engine::switch::ends::About;
use crate::engine::switch::flow::{Role, Switched, carried_bytes, tcp_header};
use crate::engine::switch::permit::Permit;
use crate::engine::switch::track::Sender;
use crate::engine::switch::{Packet, Passed};
use crate::engine::{Engine, Time, fragment, inbound};
use crate::mac::Mac;
use crate::message::FlowEnd;

impl Engine {
    /// Takes what another guest's driver handed over.
    pub fn handle_passed(&mut self, now: Time, passed: &Passed) {
        self.clock = now;
        let taken = match passed {
            Passed::Frame(frame) => self.take_frame(frame),
            Passed::Packet(packet) => self.take_packet(now, packet),
        };
        if let Err(reason) = taken {
            self.count_drop(reason);
        }
    }

    fn take_frame(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        // It may have been closed while the frame waited.
        if !self.settings.switch_open {
            return Err(DropReason::GuestToGuest);
        }
        if frame.len() > self.transmit.frame_bytes_max() {
            return Err(DropReason::Oversize);
        }
        if self.transmit.frame(frame) {
            Ok(())
        } else {
            Err(DropReason::TransmitQueueFull)
        }
    }

    fn take_packet(&mut self, now: Time, packet: &Packet) -> Result<(), DropReason> {
        let ip = Ip::parse(&packet.bytes)?;
        // The other engine lets neither through; here is where it would matter.
        if ip.is_fragment() || inbound::is_dhcp_answer(&ip) {
            return Err(DropReason::GuestToGuest);
        }
        let About { key, is_error } = About::received(&ip).ok_or(DropReason::IpProtocol)?;
        let at = match self.flows.find(&key) {
            Some(at) if self.is_part_of(at, packet) => at,
            _ if is_error => return Err(DropReason::GuestToGuest),
            found => self.take_on(now, key, found, packet)?,
        };
        if !self.deliver(packet.mac, &ip) {
            return Err(DropReason::TransmitQueueFull);
        }
        if is_error {
            return Ok(());
        }
        if let Some(flow) = self.flows.get_mut(at) {
            flow.last_active = now;
        }
        if let Some(header) = tcp_header(&ip) {
            self.observe(now, at, Sender::Neighbour, &header);
        }
        let bytes = carried_bytes(&ip);
        if bytes != 0 && self.switched(at).is_some_and(Switched::is_opener) {
            self.count_bytes(now, at, 0, bytes);
        }
        Ok(())
    }

    /// Whether a packet belongs to the flow in this place.
    fn is_part_of(&self, at: usize, packet: &Packet) -> bool {
        let Some(switched) = self.switched(at) else {
            return false;
        };
        let same = |permit: &Arc<Permit>| permit.flow() == switched.permit.flow();
        switched.neighbour == packet.from
            && switched.permit.is_open()
            && packet.permit.as_ref().is_none_or(same)
    }

    /// The first packet of a flow that another guest opened: its place, if it can be kept. `found` is what
    /// is between the same two ends.
    fn take_on(
        &mut self,
        now: Time,
        key: FlowKey,
        found: Option<usize>,
        packet: &Packet,
    ) -> Result<usize, DropReason> {
        let Some(permit) = &packet.permit else {
            return Err(DropReason::GuestToGuest);
        };
        // One that is over makes way, as it will when the word of its end arrives.
        if let Some(at) = found
            && self.switched(at).is_some_and(|s| !s.permit.is_open())
        {
            self.reset_switched(at);
            self.end_flow(at, FlowEnd::Unreachable);
        }
        let is_own = self.has_address(key.guest.ip());
        let refusal = if !is_own {
            Some((FlowEnd::Unreachable, DropReason::UnknownStation))
        } else if self.settings.forwards_closed {
            Some((FlowEnd::Cut, DropReason::GuestToGuest))
        } else if self.flows.contains(&key) {
            // A flow of this guest's own between the same two ends was there first.
            Some((FlowEnd::Unreachable, DropReason::GuestToGuest))
        } else if !self.flows.has_room() || !self.targeted.has_room(packet.from) {
            Some((FlowEnd::Evicted, DropReason::FlowLimit))
        } else {
            None
        };
        if let Some((end, reason)) = refusal {
            if permit.close_at_target() {
                self.tell_closed(permit, packet.from, end);
            }
            return Err(reason);
        }
        if !permit.accept() {
            return Err(DropReason::GuestToGuest);
        }
        self.targeted.enter(packet.from);
        let switched = Switched::new(packet.from, Arc::clone(permit), Role::Target);
        let wanted = Wanted {
            neighbour: Some(packet.from),
            ..Wanted::plain(key)
        };
        let state = State::Switched(Box::new(switched));
        Ok(self.insert(Flow::new(permit.flow(), now, wanted, state)))
    }

    /// Queues another guest's packet. False when there is no room.
    fn deliver(&mut self, from: Mac, ip: &Ip<'_>) -> bool {
        // What was put together from fragments is taken apart again.
        if ip.packet.len() > self.config.mtu_bytes && ip.protocol != TCP && !ip.do_not_fragment() {
            return fragment::split(ip, self.config.mtu_bytes, from, &mut self.transmit);
        }
        self.transmit
            .packet_from(from, ip.ether_type(), ip.packet.len(), |room| {
                room.copy_from_slice(ip.packet);
            })
            .is_some()
    }
}
