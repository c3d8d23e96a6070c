//! UDP associations and ICMP echo sessions.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{FlowKey, Protocol, VerdictAction, VmId};

use crate::engine::cache::Decision;
use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;
use crate::engine::reply::{self, Unreachable};
use crate::engine::{Engine, Event, Outcome, Time, UDP_IDLE, UDP_UNANSWERED_IDLE, held, inbound};

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
    pub(super) fn handle_udp<'a>(&mut self, now: Time, ip: &Ip<'a>) -> Result<Outcome<'a>, DropReason> {
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

        if inbound::is_dhcp_answer(ip) && self.is_guest_address(ip.destination) {
            return Err(DropReason::RogueDhcp);
        }
        if let Some(at) = self.flows.find(&key) {
            match self.flows.get(at).map(|f| &f.state) {
                Some(State::Udp) => return Ok(Outcome::Datagram { flow: at, payload }),
                Some(State::Checked(_)) => return self.pass_checked(now, at, payload),
                Some(State::Switched(_)) => {
                    if let Some(outcome) = self.pass_datagram(now, at, ip)? {
                        return Ok(outcome);
                    }
                }
                _ => {
                    self.keep_held(at, ip, payload)?;
                    return Ok(Outcome::Done);
                }
            }
        }
        if peer.port() == 0 {
            return Err(DropReason::Malformed);
        }
        if self.is_gateway(peer.ip()) {
            if peer.port() == DNS_PORT {
                self.handle_dns_datagram(now, guest, peer.ip(), payload);
                return Ok(Outcome::Done);
            }
            self.refuse_unreachable(ip, Unreachable::Port);
            return Err(DropReason::GatewayService);
        }
        if self.is_redirected(peer) {
            self.handle_dns_datagram(now, guest, peer.ip(), payload);
            return Ok(Outcome::Done);
        }
        self.open_datagrams(now, ip, key, State::Udp, payload)
    }

    pub(super) fn handle_icmp<'a>(&mut self, now: Time, ip: &Ip<'a>) -> Result<Outcome<'a>, DropReason> {
        let message = ip.payload();
        let header = message.first_chunk::<ICMP_BYTES>().ok_or(DropReason::Malformed)?;
        let (protocol, [request, reply]) = match ip.destination {
            IpAddr::V4(_) => (Protocol::Icmp, ECHO),
            IpAddr::V6(_) => (Protocol::Icmpv6, ECHO_V6),
        };
        // Only echo requests open sessions; errors and the like have a place between guests alone.
        if header[..2] != [request, 0] {
            return self.pass_answer(now, ip);
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
            match self.flows.get(at).map(|f| &f.state) {
                Some(State::Echo) => return Ok(Outcome::Echo { flow: at, message }),
                Some(State::Switched(_)) => {
                    if let Some(outcome) = self.pass_datagram(now, at, ip)? {
                        return Ok(outcome);
                    }
                }
                _ => return Ok(Outcome::Done),
            }
        }
        self.open_datagrams(now, ip, key, State::Echo, message)
    }

    /// The first packet of a UDP or echo flow: sent at once, or held.
    fn open_datagrams<'a>(
        &mut self,
        now: Time,
        ip: &Ip<'a>,
        key: FlowKey,
        state: State,
        payload: &'a [u8],
    ) -> Result<Outcome<'a>, DropReason> {
        let wanted = self.wanted(ip, key)?;
        self.make_room(key.protocol)?;
        match self.decide(now, &wanted) {
            Some(decision) if decision.action == VerdictAction::Allow => {
                if let Some(neighbour) = wanted.neighbour {
                    return Ok(self.open_switched(now, ip, wanted, neighbour, decision));
                }
                if self.is_unresolved(&wanted) {
                    if payload.len() > held::DATAGRAM_BYTES_MAX {
                        return Err(DropReason::HeldLimit);
                    }
                    self.open_unresolved(now, wanted, payload.into(), ip.short_quote().into(), &decision);
                    return Ok(Outcome::Done);
                }
                let descriptor = self.take_descriptor().ok_or(DropReason::FlowLimit)?;
                let at = self.new_flow(now, wanted, state);
                if let Some(flow) = self.flows.get_mut(at) {
                    flow.decision = Some(decision);
                    flow.descriptor = Some(descriptor);
                }
                self.report_opened(now, at, None);
                if key.protocol != Protocol::Udp {
                    self.schedule(now, at);
                    return Ok(Outcome::Echo {
                        flow: at,
                        message: payload,
                    });
                }
                if let State::Checked(checked) = self.association(now, at) {
                    if let Some(flow) = self.flows.get_mut(at) {
                        flow.state = State::Checked(checked);
                    }
                    self.schedule(now, at);
                    return self.pass_checked(now, at, payload);
                }
                self.schedule(now, at);
                Ok(Outcome::Datagram { flow: at, payload })
            }
            Some(decision) => {
                self.tally(now, &wanted, &decision);
                if decision.action == VerdictAction::Deny {
                    self.refuse_unreachable(ip, Unreachable::Prohibited);
                }
                Err(DropReason::Denied)
            }
            None => {
                let kept = to_keep(wanted.neighbour, ip, payload);
                if kept.len() > held::DATAGRAM_BYTES_MAX {
                    return Err(DropReason::HeldLimit);
                }
                let quote = ip.short_quote().into();
                if self.hold(now, wanted, vec![kept.into()], quote, None) {
                    Ok(Outcome::Done)
                } else {
                    self.refuse_unreachable(ip, Unreachable::Prohibited);
                    Err(DropReason::HeldLimit)
                }
            }
        }
    }

    /// Room for one more flow of a kind: the longest idle association makes way.
    pub(super) fn make_room(&mut self, kind: Protocol) -> Result<(), DropReason> {
        self.evict_beyond_limit(kind);
        if self.flows.has_room() {
            Ok(())
        } else {
            Err(DropReason::FlowLimit)
        }
    }

    /// Keeps a further datagram of a held flow: the first few, the oldest.
    fn keep_held(&mut self, at: usize, ip: &Ip<'_>, payload: &[u8]) -> Result<(), DropReason> {
        let Some(flow) = self.flows.get_mut(at) else {
            return Ok(());
        };
        let payload = to_keep(flow.neighbour, ip, payload);
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
        miss: Option<vnet_proto::model::MissId>,
    ) {
        let Some(kind) = self.flows.get(at).map(|flow| flow.key.protocol) else {
            return;
        };
        // One answer may let many held flows go on at once; the limits hold for them too.
        self.evict_beyond_limit(kind);
        let Some(descriptor) = self.take_descriptor() else {
            self.refuse_beyond_limit(now, at, decision, miss);
            return;
        };
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let State::Held(waiting) = &mut flow.state else {
            return;
        };
        let packets = std::mem::take(&mut waiting.packets);
        flow.decision = Some(Arc::clone(decision));
        flow.descriptor = Some(descriptor);
        flow.last_active = now;
        let state = match kind {
            Protocol::Udp => self.association(now, at),
            _ => State::Echo,
        };
        let is_checked = matches!(state, State::Checked(_));
        if let Some(flow) = self.flows.get_mut(at) {
            flow.state = state;
        }
        self.enter_kind(at);
        self.report_opened(now, at, miss);
        self.schedule(now, at);
        if is_checked {
            self.pass_held(now, at, packets);
        } else {
            self.events.push_back(Event::Send { flow: at, packets });
        }
    }

    /// A datagram for a UDP flow came from the host's side. What is for a flow that is held, or of another kind, is
    /// left over from one that had the place before, and goes nowhere.
    pub fn handle_datagram(&mut self, now: Time, at: usize, payload: &[u8]) {
        let Some(flow) = self.flows.get(at) else { return };
        if !matches!(flow.state, State::Udp | State::Checked(_)) {
            return;
        }
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
        if !matches!(flow.state, State::Echo) {
            return;
        }
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
}

/// What is kept of a held datagram: to another guest the whole packet goes on as it is.
fn to_keep<'a>(neighbour: Option<VmId>, ip: &Ip<'a>, payload: &'a [u8]) -> &'a [u8] {
    match neighbour {
        Some(_) => ip.packet,
        None => payload,
    }
}
