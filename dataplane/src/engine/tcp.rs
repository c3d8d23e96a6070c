//! TCP: from a SYN to the end of a connection.
//!
//! The host's side is dialled first; only when it answers is the guest's handshake completed, so that
//! a refused or unreachable destination looks to the guest as on a real network.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use vnet_proto::model::{FlowKey, Protocol, VerdictAction};

use crate::descriptors::Descriptor;
use crate::engine::cache::Decision;
use crate::engine::flow::{State, Waiting};
use crate::engine::frame::DropReason;
use crate::engine::guest_api::GUEST_API_PORT;
use crate::engine::ip::Ip;
use crate::engine::judge::Wanted;
use crate::engine::reply::{self, TcpHeader, Unreachable};
use crate::engine::stack::{Connection, Phase};
use crate::engine::{Engine, Event, Outcome, Time, held};
use crate::message::FlowEnd;

/// The gateway's DNS over TCP (RFC 7766).
const DNS_PORT: u16 = 53;
/// How long the host's side may take to answer a dial.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(30);
/// How long an established connection may be silent (RFC 5382 REQ-5: at least 2 hours 4 minutes).
pub const TCP_IDLE: Duration = Duration::from_secs(7_500);
/// A guest that does not repeat its SYN within this long at first, or within a multiple of its last
/// interval, has given up. RFC 6298 §5.7 repeats after 1 s, then doubles; some stacks begin at 3 s.
const FIRST_REPEAT: Duration = Duration::from_secs(4);
const REPEAT_FACTOR: u32 = 3;

/// Why a dial failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DialError {
    /// The destination answered with RST.
    Refused,
    /// No way to the host.
    HostUnreachable,
    /// No way to the network.
    NetworkUnreachable,
    /// No answer in time.
    TimedOut,
    /// The host's own refusal: no sockets or ports left, not permitted.
    Local,
}

impl Engine {
    pub(super) fn handle_tcp<'a>(&mut self, now: Time, ip: &Ip<'a>) -> Result<Outcome<'a>, DropReason> {
        let header = TcpHeader::parse(ip.payload()).ok_or(DropReason::Malformed)?;
        if header.is_contradictory() {
            return Err(DropReason::Malformed);
        }
        let key = FlowKey {
            protocol: Protocol::Tcp,
            guest: SocketAddr::new(ip.source, header.source),
            peer: SocketAddr::new(ip.destination, header.destination),
        };
        if let Some(at) = self.flows.find(&key) {
            if let Some(outcome) = self.pass_segment(now, at, ip, &header)? {
                return Ok(outcome);
            }
            if let Some(flow) = self.flows.get_mut(at)
                && let Some(connection) = flow.state.connection_mut()
                && !header.is_syn()
            {
                connection.handle_packet(now, ip.packet, header.payload_bytes(), &mut self.transmit);
                self.mark_dirty(at);
                return Ok(Outcome::Done);
            }
            if !self.handle_opening(now, at, &header) {
                return Ok(Outcome::Done);
            }
        }
        if !header.is_syn() {
            reply::reset(&mut self.transmit, ip.source, ip.destination, &header);
            return Ok(Outcome::Done);
        }
        self.open_tcp(now, ip, key, &header)
    }

    /// A segment for a flow that is held, dialling, or gets a SYN. True when the flow made way and
    /// the segment opens a new one.
    fn handle_opening(&mut self, now: Time, at: usize, header: &TcpHeader) -> bool {
        let Some(flow) = self.flows.get_mut(at) else {
            return true;
        };
        match &mut flow.state {
            State::Held(_) | State::Dialing { .. } if header.is_reset() => {
                self.end_flow(at, FlowEnd::GuestReset);
                false
            }
            State::Held(waiting) => {
                if header.is_syn() && same_syn(&waiting.packets, header) {
                    let silence = now.saturating_sub(flow.last_active);
                    flow.last_active = now;
                    waiting.gives_up_at = Some(now + FIRST_REPEAT.max(silence * REPEAT_FACTOR));
                    self.schedule(now, at);
                    return false;
                }
                header.is_syn() && {
                    self.end_flow(at, FlowEnd::GuestReset);
                    true
                }
            }
            State::Dialing { syn, .. } => {
                let repeated = header.is_syn() && same_syn(std::slice::from_ref(syn), header);
                header.is_syn() && !repeated && {
                    self.end_flow(at, FlowEnd::GuestReset);
                    true
                }
            }
            State::Udp | State::Checked(_) | State::Echo | State::Switched(_) => false,
            state => {
                // A repeated SYN while the SYN-ACK is on its way is answered by its retransmission. Any
                // other SYN on a live connection comes from a guest that was started anew.
                if state
                    .connection_mut()
                    .is_none_or(|connection| connection.phase() == Phase::Opening)
                {
                    return false;
                }
                self.end_flow(at, FlowEnd::GuestReset);
                true
            }
        }
    }

    fn open_tcp<'a>(
        &mut self,
        now: Time,
        ip: &Ip<'a>,
        key: FlowKey,
        header: &TcpHeader,
    ) -> Result<Outcome<'a>, DropReason> {
        let refuse = |engine: &mut Self, reason| {
            reply::reset(&mut engine.transmit, ip.source, ip.destination, header);
            Err(reason)
        };
        if header.source == 0 || header.destination == 0 {
            return Err(DropReason::Malformed);
        }
        if !self.flows.has_room() {
            return refuse(self, DropReason::FlowLimit);
        }
        if self.is_gateway(ip.destination) {
            return match header.destination {
                DNS_PORT => self.open_service(now, ip, key).map(|()| Outcome::Done),
                GUEST_API_PORT if self.guest_api.offered && ip.destination.is_ipv4() => {
                    match self.open_guest_api(now, ip, key) {
                        Ok(()) => Ok(Outcome::Done),
                        Err(reason) => refuse(self, reason),
                    }
                }
                _ => refuse(self, DropReason::GatewayService),
            };
        }
        if self.is_redirected(key.peer) {
            self.dns.count_redirected();
            return self.open_service(now, ip, key).map(|()| Outcome::Done);
        }
        let wanted = self.wanted(ip, key)?;
        match self.decide(now, &wanted) {
            Some(decision) => match (decision.action, wanted.neighbour) {
                (VerdictAction::Allow, Some(neighbour)) => {
                    Ok(self.open_switched(now, ip, wanted, neighbour, decision))
                }
                (VerdictAction::Allow, None) if self.is_unresolved(&wanted) => {
                    self.open_unresolved(now, wanted, reply::kept_syn(ip), Box::default(), &decision);
                    Ok(Outcome::Done)
                }
                (VerdictAction::Allow, None) => {
                    let Some(descriptor) = self.take_descriptor() else {
                        return refuse(self, DropReason::FlowLimit);
                    };
                    self.dial(now, wanted, reply::kept_syn(ip), decision, descriptor);
                    Ok(Outcome::Done)
                }
                (VerdictAction::Deny, _) => {
                    self.tally(now, &wanted, &decision);
                    refuse(self, DropReason::Denied)
                }
                (VerdictAction::Drop, _) => {
                    self.tally(now, &wanted, &decision);
                    Err(DropReason::Denied)
                }
            },
            None => {
                let waiting = vec![match wanted.neighbour {
                    // It goes on as it came, unless it is longer than what is kept of datagrams.
                    Some(_) if ip.packet.len() <= held::DATAGRAM_BYTES_MAX => ip.packet.into(),
                    _ => reply::kept_syn(ip),
                }];
                if self.hold(now, wanted, waiting, Box::default(), Some(now + FIRST_REPEAT)) {
                    Ok(Outcome::Done)
                } else {
                    refuse(self, DropReason::HeldLimit)
                }
            }
        }
    }

    /// Puts a flow on hold and asks. False at a limit.
    pub(super) fn hold(
        &mut self,
        now: Time,
        wanted: Wanted,
        packets: Vec<Box<[u8]>>,
        quote: Box<[u8]>,
        gives_up_at: Option<Time>,
    ) -> bool {
        let placeholder = Waiting {
            miss: vnet_proto::model::MissId(0),
            packets,
            quote,
            deadline: now,
            gives_up_at,
        };
        let at = self.new_flow(now, wanted, State::Held(placeholder));
        let Some((miss, count, hold)) = self.held.join_flow(wanted.target(), at) else {
            self.flows.remove(at);
            self.flows.release(at);
            return false;
        };
        if let Some(flow) = self.flows.get_mut(at)
            && let State::Held(waiting) = &mut flow.state
        {
            waiting.miss = miss;
            waiting.deadline = now + hold;
        }
        self.schedule(now, at);
        self.ask_flow(now, miss, &wanted, count, hold);
        true
    }

    fn dial(
        &mut self,
        now: Time,
        wanted: Wanted,
        syn: Box<[u8]>,
        decision: Arc<Decision>,
        descriptor: Descriptor,
    ) {
        let at = self.new_flow(
            now,
            wanted,
            State::Dialing {
                syn,
                deadline: now + DIAL_PATIENCE,
            },
        );
        self.start_dial(now, at, decision, None, descriptor);
    }

    /// Lets a held flow dial.
    pub(super) fn dial_held(
        &mut self,
        now: Time,
        at: usize,
        decision: &Arc<Decision>,
        miss: Option<vnet_proto::model::MissId>,
    ) {
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
        let Some(syn) = waiting.packets.pop() else { return };
        flow.state = State::Dialing {
            syn,
            deadline: now + DIAL_PATIENCE,
        };
        self.start_dial(now, at, Arc::clone(decision), miss, descriptor);
    }

    fn start_dial(
        &mut self,
        now: Time,
        at: usize,
        decision: Arc<Decision>,
        miss: Option<vnet_proto::model::MissId>,
        descriptor: Descriptor,
    ) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        flow.decision = Some(decision);
        flow.descriptor = Some(descriptor);
        let (to, requires_name) = (flow.dialled, flow.requires_name());
        self.report_opened(now, at, miss);
        if requires_name {
            self.begin_reading(now, at);
            return;
        }
        self.events.push_back(Event::Dial { flow: at, to });
        self.schedule(now, at);
    }

    /// The host's side of a flow is connected: answer the guest's SYN.
    pub fn handle_dialled(&mut self, now: Time, at: usize) {
        if let Some(flow) = self.flows.get_mut(at)
            && matches!(&flow.state, State::Reading(reading) if reading.is_dialling())
        {
            // The guest has had its answer already.
            if let State::Reading(reading) = std::mem::replace(&mut flow.state, State::Echo) {
                flow.state = State::Tcp(Box::new(reading.connection));
            }
            flow.last_active = now;
            self.mark_dirty(at);
            return;
        }
        let seed = self.random.next_u64();
        let slot = self.rings.take();
        let mtu_bytes = self.config.mtu_bytes;
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let State::Dialing { syn, .. } = &flow.state else {
            return;
        };
        let Some(slot) = slot else {
            self.handle_refused(now, at, DialError::Local);
            return;
        };
        let (peer, syn) = (flow.key.peer, syn.clone());
        match Connection::accept(now, peer, mtu_bytes, slot, seed, &syn, &mut self.transmit) {
            Some(mut connection) => {
                connection.check = flow.check(&self.settings);
                flow.state = State::Tcp(Box::new(connection));
                flow.last_active = now;
                self.mark_dirty(at);
            }
            None => self.handle_refused(now, at, DialError::Local),
        }
    }

    /// The host's side of a flow cannot be reached: say it to the guest as the network would.
    pub fn handle_refused(&mut self, now: Time, at: usize, error: DialError) {
        if error == DialError::Local && self.flows.get(at).is_some() {
            self.dials_failed += 1;
            self.want_report(now);
        }
        let Some(flow) = self.flows.get(at) else { return };
        if let Some(place) = self.synthetics.find(flow.key.peer.ip()) {
            self.synthetics.pass_turn(place);
        }
        let syn = match &flow.state {
            State::Dialing { syn, .. } => syn.clone(),
            // Its handshake was completed to hear its name: nothing but RST is left to say it with.
            State::Reading(_) => {
                self.cut(now, at, FlowEnd::Unreachable);
                return;
            }
            _ => return,
        };
        if let Ok(ip) = Ip::parse(&syn) {
            match error {
                DialError::Refused => {
                    if let Some(header) = TcpHeader::parse(ip.payload()) {
                        reply::reset(&mut self.transmit, ip.source, ip.destination, &header);
                    }
                }
                DialError::NetworkUnreachable => self.refuse_unreachable(&ip, Unreachable::Network),
                DialError::HostUnreachable | DialError::TimedOut | DialError::Local => {
                    self.refuse_unreachable(&ip, Unreachable::Host);
                }
            }
        }
        self.end_flow(at, FlowEnd::Unreachable);
    }

    pub(super) fn refuse_unreachable(&mut self, cause: &Ip<'_>, why: Unreachable) {
        let gateway = self.gateway_towards(cause.source);
        reply::unreachable(&mut self.transmit, gateway, cause.source, cause.quote(), why);
    }

    fn open_service(&mut self, now: Time, ip: &Ip<'_>, key: FlowKey) -> Result<(), DropReason> {
        let seed = self.random.next_u64();
        let slot = self.rings.take().ok_or(DropReason::FlowLimit)?;
        let mtu = self.config.mtu_bytes;
        let connection = Connection::accept(now, key.peer, mtu, slot, seed, ip.packet, &mut self.transmit)
            .ok_or(DropReason::Malformed)?;
        let at = self.new_flow(now, Wanted::plain(key), State::Service(Box::new(connection)));
        self.mark_dirty(at);
        Ok(())
    }

    /// A TCP flow's connection, to move bytes between its rings and the host's socket.
    pub fn connection(&mut self, at: usize) -> Option<&mut Connection> {
        match &mut self.flows.get_mut(at)?.state {
            State::Tcp(connection) => Some(connection),
            _ => None,
        }
    }

    /// The host's side ended with an error: reset the guest's.
    pub fn handle_host_reset(&mut self, now: Time, at: usize) {
        self.reset_guest(now, at);
        self.end_flow(at, FlowEnd::HostReset);
    }

    /// Queues RST towards the guest for a TCP flow in any state.
    pub(super) fn reset_guest(&mut self, now: Time, at: usize) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        match &mut flow.state {
            State::Dialing { syn, .. } => {
                if let Ok(ip) = Ip::parse(syn)
                    && let Some(header) = TcpHeader::parse(ip.payload())
                {
                    reply::reset(&mut self.transmit, ip.source, ip.destination, &header);
                }
            }
            State::Switched(_) => self.reset_switched(at),
            state => {
                if let Some(connection) = state.connection_mut() {
                    connection.abort();
                    connection.poll_transmit(now, &mut self.transmit);
                }
            }
        }
    }

    /// After bytes were moved: sends what the connection has to send, ends it when it is over, sets
    /// its timer. False when the queue towards the guest ran out of room: come back when it has some.
    pub fn finish_service(&mut self, now: Time, at: usize) -> bool {
        match self.flows.get(at).map(|f| &f.state) {
            Some(State::Service(_)) => self.serve_dns(now, at),
            Some(State::Reading(_)) => self.read_name(now, at),
            _ => {}
        }
        let Some(flow) = self.flows.get_mut(at) else {
            return true;
        };
        if let State::Tcp(connection) = &mut flow.state
            && let Some(check) = &mut connection.check
            && let Some(refusal) = check.refusal(now)
        {
            self.refuse_name(now, at, &refusal);
            return true;
        }
        let Some(connection) = flow.state.connection_mut() else {
            return true;
        };
        let sent_all = connection.poll_transmit(now, &mut self.transmit);
        if connection.phase() == Phase::Over {
            let end = if connection.is_finished() {
                FlowEnd::Finished
            } else {
                FlowEnd::GuestReset
            };
            let end = if flow.decision.is_none() && !flow.ingress {
                FlowEnd::Finished
            } else {
                end
            };
            self.end_flow(at, end);
            return true;
        }
        self.schedule(now, at);
        sent_all
    }
}

/// Whether a SYN is the one that is kept.
fn same_syn(packets: &[Box<[u8]>], header: &TcpHeader) -> bool {
    packets
        .first()
        .and_then(|packet| TcpHeader::parse(Ip::parse(packet).ok()?.payload()))
        .is_some_and(|kept| kept.sequence == header.sequence)
}
