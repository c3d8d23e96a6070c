//! UDP associations and ICMP echo sessions.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{FlowKey, Protocol, VerdictAction};

use crate::engine::cache::Decision;
use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;
use crate::engine::reply::{self, Unreachable};
use crate::engine::{
    ECHO_FLOWS_MAX, Engine, Event, Outcome, Time, UDP_FLOWS_MAX, UDP_IDLE, UDP_UNANSWERED_IDLE, held,
};
use crate::message::FlowEnd;

const UDP_BYTES: usize = 8;
const ICMP_BYTES: usize = 8;
const DNS_PORT: u16 = 53;
/// Types of echo request and reply (RFC 792, RFC 4443 §4).
const ECHO: [u8; 2] = [8, 0];
const ECHO_V6: [u8; 2] = [128, 129];

/// How long a UDP association lives without a packet.
pub(super) fn udp_idle(bytes_down: u64) -> Duration {
    if bytes_down == 0 {
        UDP_UNANSWERED_IDLE
    } else {
        UDP_IDLE
    }
}

impl Engine {
    pub(super) fn handle_udp<'a>(&mut self, now: Time, ip: Ip<'a>) -> Result<Outcome<'a>, DropReason> {
        let datagram = ip.payload();
        let header = datagram.first_chunk::<UDP_BYTES>().ok_or(DropReason::Malformed)?;
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let length = if length == 0 { datagram.len() } else { length };
        let payload = datagram.get(UDP_BYTES..length).ok_or(DropReason::Malformed)?;
        let guest = SocketAddr::new(ip.source, u16::from_be_bytes([header[0], header[1]]));
        let peer = SocketAddr::new(ip.destination, u16::from_be_bytes([header[2], header[3]]));
        let key = FlowKey {
            protocol: Protocol::Udp,
            guest,
            peer,
        };

        if let Some(at) = self.flows.find(&key) {
            return Ok(match self.flows.get(at).map(|f| &f.state) {
                Some(State::Udp) => Outcome::Datagram { flow: at, payload },
                _ => {
                    self.keep_held(at, payload)?;
                    Outcome::Done
                }
            });
        }
        if peer.port() == 0 {
            return Err(DropReason::Malformed);
        }
        if self.is_gateway(peer.ip()) {
            if peer.port() == DNS_PORT {
                self.handle_dns_datagram(now, guest, peer.ip(), payload);
                return Ok(Outcome::Done);
            }
            self.refuse_unreachable(&ip, Unreachable::Port);
            return Err(DropReason::GatewayService);
        }
        self.open_datagrams(now, &ip, key, State::Udp, payload)
            .map(|at| at.map_or(Outcome::Done, |at| Outcome::Datagram { flow: at, payload }))
    }

    pub(super) fn handle_icmp<'a>(&mut self, now: Time, ip: Ip<'a>) -> Result<Outcome<'a>, DropReason> {
        let message = ip.payload();
        let header = message.first_chunk::<ICMP_BYTES>().ok_or(DropReason::Malformed)?;
        let (protocol, [request, reply]) = match ip.destination {
            IpAddr::V4(_) => (Protocol::Icmp, ECHO),
            IpAddr::V6(_) => (Protocol::Icmpv6, ECHO_V6),
        };
        // Errors and the like are for the guest's own kernel; only echo requests open sessions.
        if header[..2] != [request, 0] {
            return Err(DropReason::IpProtocol);
        }
        if self.is_gateway(ip.destination) {
            let mut answer = message.to_vec();
            answer[0] = reply;
            let mtu = self.config.mtu_bytes;
            if !reply::icmp(&mut self.transmit, ip.destination, ip.source, &answer, mtu) {
                return Err(DropReason::TransmitQueueFull);
            }
            return Ok(Outcome::Done);
        }
        let identifier = u16::from_be_bytes([header[4], header[5]]);
        let key = FlowKey {
            protocol,
            guest: SocketAddr::new(ip.source, identifier),
            peer: SocketAddr::new(ip.destination, 0),
        };
        if let Some(at) = self.flows.find(&key) {
            return Ok(match self.flows.get(at).map(|f| &f.state) {
                Some(State::Echo) => Outcome::Echo { flow: at, message },
                _ => Outcome::Done,
            });
        }
        self.open_datagrams(now, &ip, key, State::Echo, message)
            .map(|at| at.map_or(Outcome::Done, |at| Outcome::Echo { flow: at, message }))
    }

    /// The first packet of a UDP or echo flow: its place when it may be sent at once, `None` when held.
    fn open_datagrams(
        &mut self,
        now: Time,
        ip: &Ip<'_>,
        key: FlowKey,
        state: State,
        payload: &[u8],
    ) -> Result<Option<usize>, DropReason> {
        if let Err(reason) = self.check_destination(ip.destination) {
            if reason == DropReason::UnknownStation {
                self.refuse_unreachable(ip, Unreachable::Host);
            }
            return Err(reason);
        }
        self.make_room(&state)?;
        let dialled = self.dialled(key.peer);
        self.check_way(ip, dialled.ip())?;
        match self.decide(now, &key, dialled) {
            Some(decision) if decision.action == VerdictAction::Allow => {
                let at = self.new_flow(now, key, dialled, state);
                if let Some(flow) = self.flows.get_mut(at) {
                    flow.decision = Some(decision);
                }
                self.report_opened(now, at, None);
                self.schedule(now, at);
                Ok(Some(at))
            }
            Some(decision) => {
                self.tally(now, &key, dialled, &decision);
                if decision.action == VerdictAction::Deny {
                    self.refuse_unreachable(ip, Unreachable::Prohibited);
                }
                Err(DropReason::Denied)
            }
            None => {
                if payload.len() > held::DATAGRAM_BYTES_MAX {
                    return Err(DropReason::HeldLimit);
                }
                let quote = ip.short_quote().into();
                if self.hold(now, key, dialled, vec![payload.into()], quote, None) {
                    Ok(None)
                } else {
                    self.refuse_unreachable(ip, Unreachable::Prohibited);
                    Err(DropReason::HeldLimit)
                }
            }
        }
    }

    /// Room for one more flow of a kind: the longest idle association makes way.
    fn make_room(&mut self, state: &State) -> Result<(), DropReason> {
        self.evict_beyond_limit(matches!(state, State::Udp));
        if self.flows.has_room() {
            Ok(())
        } else {
            Err(DropReason::FlowLimit)
        }
    }

    /// Ends the longest idle flow of a kind when there are as many as there may be.
    fn evict_beyond_limit(&mut self, is_udp: bool) {
        let (count, max) = if is_udp {
            (self.udp_flows, UDP_FLOWS_MAX)
        } else {
            (self.echo_flows, ECHO_FLOWS_MAX)
        };
        if count < max {
            return;
        }
        let of_kind = |state: &State| match state {
            State::Udp => is_udp,
            State::Echo => !is_udp,
            _ => false,
        };
        if let Some(idle) = self.flows.longest_idle(of_kind) {
            self.end_flow(idle, FlowEnd::Evicted);
        }
    }

    /// Keeps a further datagram of a held flow: the first few, the oldest.
    fn keep_held(&mut self, at: usize, payload: &[u8]) -> Result<(), DropReason> {
        let Some(flow) = self.flows.get_mut(at) else {
            return Ok(());
        };
        let State::Held(waiting) = &mut flow.state else {
            return Ok(());
        };
        let kept: usize = waiting.packets.iter().map(|p| p.len()).sum();
        if waiting.packets.len() >= held::DATAGRAMS_MAX || kept + payload.len() > held::DATAGRAM_BYTES_MAX {
            return Err(DropReason::HeldLimit);
        }
        waiting.packets.push(payload.into());
        Ok(())
    }

    /// Lets a held UDP or echo flow go on.
    pub(super) fn open_held(
        &mut self,
        now: Time,
        at: usize,
        decision: &Arc<Decision>,
        miss: vnet_proto::model::MissId,
    ) {
        let is_udp = self
            .flows
            .get(at)
            .is_some_and(|flow| flow.key.protocol == Protocol::Udp);
        // One answer may let many held flows go on at once; the limits hold for them too.
        self.evict_beyond_limit(is_udp);
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let State::Held(waiting) = &mut flow.state else {
            return;
        };
        let packets = std::mem::take(&mut waiting.packets);
        if flow.key.protocol == Protocol::Udp {
            flow.state = State::Udp;
            self.udp_flows += 1;
        } else {
            flow.state = State::Echo;
            self.echo_flows += 1;
        }
        flow.decision = Some(Arc::clone(decision));
        flow.last_active = now;
        self.report_opened(now, at, Some(miss));
        self.events.push_back(Event::Send { flow: at, packets });
        self.schedule(now, at);
    }

    /// A datagram for a UDP flow came from the host's side.
    pub fn handle_datagram(&mut self, now: Time, at: usize, payload: &[u8]) {
        let Some(flow) = self.flows.get(at) else { return };
        let (guest, peer) = (flow.key.guest, flow.key.peer);
        if reply::udp(&mut self.transmit, peer, guest, payload, self.config.mtu_bytes) {
            self.count_bytes(now, at, 0, payload.len());
        } else {
            self.count_drop(DropReason::TransmitQueueFull);
        }
    }

    /// An echo reply for an echo flow came from the host's side: the message, header included.
    pub fn handle_echo_reply(&mut self, now: Time, at: usize, message: &mut [u8]) {
        let Some(flow) = self.flows.get(at) else { return };
        let (guest, peer) = (flow.key.guest.ip(), flow.key.peer.ip());
        // The host's kernel chose its own identifier; the guest knows its own.
        let Some(header) = message.first_chunk_mut::<ICMP_BYTES>() else {
            return;
        };
        header[4..6].copy_from_slice(&flow.key.guest.port().to_be_bytes());
        if reply::icmp(&mut self.transmit, peer, guest, message, self.config.mtu_bytes) {
            self.count_bytes(now, at, 0, message.len());
        } else {
            self.count_drop(DropReason::TransmitQueueFull);
        }
    }

    /// The host could not send on a UDP or echo flow: say it to the guest. The next packet tries anew.
    pub fn handle_send_error(&mut self, at: usize, unreachable: Option<Unreachable>) {
        self.count_drop(DropReason::HostRefused);
        let (Some(why), Some(flow)) = (unreachable, self.flows.get(at)) else {
            return;
        };
        let (guest, peer) = (flow.key.guest, flow.key.peer);
        if flow.key.protocol == Protocol::Udp && !flow.ingress {
            let gateway = self.gateway_towards(guest.ip());
            reply::unreachable_for_udp(&mut self.transmit, gateway, guest, peer, why);
        }
    }

    /// A datagram from a client of a UDP forward: the flow's place, `None` when it is refused.
    pub fn open_ingress_udp(&mut self, now: Time, target: SocketAddr) -> Option<usize> {
        if self.settings.forwards_closed || !self.is_guest_address(target.ip()) {
            return None;
        }
        self.make_room(&State::Udp).ok()?;
        let client = self.free_ingress_port(Protocol::Udp, target)?;
        let key = FlowKey {
            protocol: Protocol::Udp,
            guest: target,
            peer: client,
        };
        let at = self.new_flow(now, key, client, State::Udp);
        if let Some(flow) = self.flows.get_mut(at) {
            flow.ingress = true;
        }
        self.report_opened(now, at, None);
        self.schedule(now, at);
        Some(at)
    }
}
