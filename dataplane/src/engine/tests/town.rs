//! Several guests of one network, each with an engine, and the network between them.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use smoltcp::wire::{Ipv4Packet, TcpPacket};
use vnet_proto::model::{FlowId, Guard, GuardSet, Miss, Protocol, VerdictAction, VmId};

use super::kit::{ALIAS, EPOCH, GATEWAY, GATEWAY_MAC, HOLD, ipv4, verdict};
use crate::engine::discovery::Ipv6Config;
use crate::engine::gateway::dhcp::DhcpOutcome;
use crate::engine::gateway::dns::zones::Zones;
use crate::engine::nat::Nat;
use crate::engine::switch::{Neighbour, Passed};
use crate::engine::{Engine, EngineConfig, Event, Outcome, Surroundings, Time};
use crate::mac::Mac;
use crate::message::{FlowEnd, FlowOpened, Order, Report, Settings};

/// Places of the guests in a town.
pub(super) const ANN: usize = 0;
pub(super) const BOB: usize = 1;
pub(super) const CAT: usize = 2;

pub(super) const SYN: u8 = 0x02;
pub(super) const SYN_ACK: u8 = 0x12;
pub(super) const ACK: u8 = 0x10;
pub(super) const FIN_ACK: u8 = 0x11;
pub(super) const RST: u8 = 0x04;
pub(super) const RST_ACK: u8 = 0x14;

/// A guest's handle, MAC and address.
pub(super) fn vm(who: usize) -> VmId {
    VmId(1 + who as u32)
}

pub(super) fn mac(who: usize) -> Mac {
    Mac([2, 0, 0, 0, 0, 2 + who as u8])
}

pub(super) fn address(who: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 127, 2 + who as u8)
}

pub(super) fn address6(who: usize) -> String {
    format!("fd00::{}", 2 + who)
}

pub(super) fn end(who: usize, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address(who), port)
}

/// Who has which address, and whose switch is open.
#[derive(Default)]
pub(super) struct Street {
    pub(super) owners: Mutex<BTreeMap<IpAddr, usize>>,
    pub(super) open: Mutex<[bool; 3]>,
}

impl Surroundings for Street {
    fn claim(&self, claimant: VmId, _: Mac, address: IpAddr, _: Time) -> bool {
        let mut owners = self.owners.lock().unwrap();
        vm(*owners.entry(address).or_insert(claimant.0 as usize - 1)) == claimant
    }
    fn learn_mac(&self, _: VmId, _: Mac) -> bool {
        true
    }
    fn dhcp(&self, client: VmId, _: Mac, _: &[u8], _: Time) -> DhcpOutcome {
        // Every message gives back the client's address.
        let given_back = address(client.0 as usize - 1);
        self.owners.lock().unwrap().remove(&IpAddr::V4(given_back));
        DhcpOutcome {
            released: Some(given_back),
            ..DhcpOutcome::default()
        }
    }
    fn neighbour(&self, address: IpAddr) -> Option<Neighbour> {
        let who = *self.owners.lock().unwrap().get(&address)?;
        Some(Neighbour {
            vm: vm(who),
            mac: mac(who),
            open: self.open.lock().unwrap()[who],
        })
    }
    fn release(&self, _: VmId, address: Ipv6Addr) {
        self.owners.lock().unwrap().remove(&IpAddr::V6(address));
    }
    fn has_ipv6(&self) -> bool {
        true
    }
    fn has_way(&self, _: IpAddr) -> bool {
        true
    }
    fn guards(&self, _: SocketAddr, _: Protocol) -> GuardSet {
        GuardSet::EMPTY
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn zones(&self) -> Arc<Zones> {
        Arc::new(Zones::default())
    }
}

/// One guest and its driver.
struct Guest {
    engine: Engine,
    inbox: VecDeque<Passed>,
    ends: VecDeque<(FlowId, FlowEnd)>,
    reports: Vec<Report>,
    gone: bool,
}

/// Three guests whose switches are closed, and who have said hello.
pub(super) struct Town {
    guests: Vec<Guest>,
    pub(super) street: Arc<Street>,
    pub(super) now: Time,
    /// Packets that one guest's inbox takes.
    pub(super) inbox_max: usize,
}

impl Town {
    pub(super) fn new() -> Self {
        Self::with_flows(64)
    }

    pub(super) fn with_flows(flows_max: usize) -> Self {
        Self::with(flows_max, None)
    }

    /// The same on a network that carries IPv6 too; each guest has its address there.
    pub(super) fn dual() -> Self {
        let mut town = Self::with(
            64,
            Some(Ipv6Config::new("fd00::/64".parse().unwrap(), Vec::new())),
        );
        for who in [ANN, BOB, CAT] {
            town.frame(who, GATEWAY_MAC, 0x86dd, &super::ipv6::probe(&address6(who)));
            town.frames(who);
        }
        town
    }

    fn with(flows_max: usize, ipv6: Option<Ipv6Config>) -> Self {
        let street = Arc::new(Street::default());
        let descriptors = crate::descriptors::Descriptors::new(1 << 20);
        let guests = (0..3).map(|who| {
            let config = EngineConfig {
                vm: vm(who),
                gateway: GATEWAY,
                gateway_mac: GATEWAY_MAC,
                subnet: "192.168.127.0/24".parse().unwrap(),
                nat: Arc::new(Nat::new([(ALIAS, Ipv4Addr::LOCALHOST.into())], [ALIAS])),
                ipv6: ipv6.clone(),
                mtu_bytes: 1500,
                pinned_mac: None,
                flows_max,
                descriptors: descriptors.attach(vm(who)).unwrap(),
                hold: HOLD,
                lookup_hold: Duration::from_secs(4),
                seed: [who as u8; 32],
            };
            let surroundings = Arc::clone(&street) as Arc<dyn Surroundings>;
            Guest {
                engine: Engine::new(config, surroundings, format!("guest-{who}")),
                inbox: VecDeque::new(),
                ends: VecDeque::new(),
                reports: Vec::new(),
                gone: false,
            }
        });
        let mut town = Self {
            guests: guests.collect(),
            street: Arc::clone(&street),
            now: Time::from_secs(100),
            inbox_max: 1_024,
        };
        for who in [ANN, BOB, CAT] {
            town.order(
                who,
                Order::Revoke {
                    command: None,
                    epoch: EPOCH,
                },
            );
            town.order(
                who,
                Order::Lease {
                    epoch: EPOCH,
                    lease: Duration::from_secs(100_000),
                },
            );
            // An echo to the gateway makes the address its own.
            let echo = ipv4(address(who), GATEWAY, 1, &[8, 0, 0, 0, 0, 1, 0, 1]);
            town.frame(who, GATEWAY_MAC, 0x0800, &echo);
            // The answer, and where there is IPv6 the gateway's word of itself.
            assert_eq!(town.frames(who).len(), 1 + usize::from(ipv6.is_some()));
        }
        town
    }

    pub(super) fn engine(&mut self, who: usize) -> &mut Engine {
        &mut self.guests[who].engine
    }

    pub(super) fn settings(&mut self, who: usize, switch_open: bool, forwards_closed: bool) {
        self.street.open.lock().unwrap()[who] = switch_open;
        self.order(
            who,
            Order::Settings(Settings {
                name: format!("guest-{who}"),
                switch_open,
                forwards_closed,
                ..super::kit::settings()
            }),
        );
    }

    pub(super) fn order(&mut self, who: usize, order: Order) {
        let now = self.now;
        self.guests[who].engine.handle_order(now, order);
        self.settle();
    }

    /// A guest sends an IPv4 packet to the owner of its destination, as if it had learned the MAC.
    pub(super) fn ip(&mut self, who: usize, packet: &[u8]) {
        let to = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
        let to = mac(to.octets()[3] as usize - 2);
        self.frame(who, to, 0x0800, packet);
    }

    pub(super) fn frame(&mut self, who: usize, to: Mac, ether_type: u16, packet: &[u8]) {
        self.frame_unsettled(who, to, ether_type, packet);
        self.settle();
    }

    /// A guest sends a frame, and no other driver has its turn yet.
    pub(super) fn frame_unsettled(&mut self, who: usize, to: Mac, ether_type: u16, packet: &[u8]) {
        let mut frame = [to.0, mac(who).0].concat();
        frame.extend_from_slice(&ether_type.to_be_bytes());
        frame.extend_from_slice(packet);
        let now = self.now;
        let (open, max) = (*self.street.open.lock().unwrap(), self.inbox_max);
        let mut outcome = self.guests[who].engine.handle_frame(now, &frame);
        if let Outcome::Switch(to) = outcome {
            outcome = Outcome::Done;
            for other in (0..self.guests.len()).filter(|o| *o != who && (mac(*o) == to || !to.is_unicast())) {
                if open[other] {
                    let inbox = &mut self.guests[other].inbox;
                    assert!(inbox.len() < max);
                    let mut passed = frame.clone();
                    passed[..6].copy_from_slice(&to.0);
                    inbox.push_back(Passed::Frame(passed.into()));
                } else if to.is_unicast() {
                    outcome = self.guests[who].engine.handle_unswitched(now, &frame);
                }
            }
        }
        let (at, packet) = match outcome {
            Outcome::Pass { flow, packet } => (flow, packet.to_vec()),
            Outcome::Assembled { flow, payload } => (flow, payload),
            Outcome::Done => return,
            Outcome::Datagram { .. }
            | Outcome::Datagrams { .. }
            | Outcome::Echo { .. }
            | Outcome::Switch(_) => panic!("to the host"),
        };
        self.pass(who, at, &packet);
    }

    fn pass(&mut self, who: usize, at: usize, packet: &[u8]) {
        let now = self.now;
        let (to, passed) = self.guests[who]
            .engine
            .to_neighbour(at, packet)
            .expect("a flow between guests");
        let max = self.inbox_max;
        let other = &mut self.guests[to.0 as usize - 1];
        if other.gone {
            let reason = crate::engine::frame::DropReason::UnknownStation;
            self.guests[who].engine.count_drop(reason);
        } else if other.inbox.len() >= max {
            let reason = crate::engine::frame::DropReason::PeerQueueFull;
            self.guests[who].engine.count_drop(reason);
        } else {
            other.inbox.push_back(passed);
            self.guests[who].engine.handle_handed_over(now, at, packet);
        }
    }

    /// Every driver has its turn until nothing moves any more.
    pub(super) fn settle(&mut self) {
        loop {
            let mut moved = false;
            for who in 0..self.guests.len() {
                moved |= self.turn(who);
            }
            if !moved {
                return;
            }
        }
    }

    /// One driver's turn: what others say has ended, what they handed over, events.
    pub(super) fn turn(&mut self, who: usize) -> bool {
        let now = self.now;
        let mut moved = false;
        let guest = &mut self.guests[who];
        if guest.gone {
            return false;
        }
        while let Some((flow, end)) = guest.ends.pop_front() {
            guest.engine.handle_permit_closed(now, flow, end);
            moved = true;
        }
        while let Some(passed) = guest.inbox.pop_front() {
            guest.engine.handle_passed(now, &passed);
            moved = true;
        }
        while let Some(event) = self.guests[who].engine.poll_event() {
            moved = true;
            match event {
                Event::Report(report) => self.guests[who].reports.push(*report),
                Event::Pass { flow, packets } => {
                    for packet in packets {
                        // As the driver does: one that has ended meanwhile leads nowhere.
                        if self.guests[who].engine.flow(flow).is_some() {
                            self.pass(who, flow, &packet);
                        }
                    }
                }
                Event::Close { .. } => {}
                Event::PermitClosed { to, flow, end } => {
                    self.guests[to.0 as usize - 1].ends.push_back((flow, end));
                }
                other => panic!("to the host: {other:?}"),
            }
        }
        moved
    }

    /// A guest's link ends.
    pub(super) fn leave(&mut self, who: usize) {
        self.guests[who].engine.handle_link_down();
        self.turn(who);
        self.vanish(who);
    }

    /// A guest's driver ends without a word.
    pub(super) fn vanish(&mut self, who: usize) {
        self.guests[who].gone = true;
        self.street
            .owners
            .lock()
            .unwrap()
            .retain(|_, owner| *owner != who);
        let now = self.now;
        for other in (0..self.guests.len()).filter(|o| *o != who) {
            self.guests[other].engine.handle_guest_gone(now, vm(who));
        }
        self.settle();
    }

    pub(super) fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let due = self.guests.iter().filter_map(|g| g.engine.poll_timeout()).min();
            let Some(at) = due.filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(at);
            let now = self.now;
            for guest in &mut self.guests {
                guest.engine.handle_timeout(now);
            }
            self.settle();
        }
        self.now = end;
    }

    /// Takes what was sent to a guest.
    pub(super) fn frames(&mut self, who: usize) -> Vec<Vec<u8>> {
        let transmit = &mut self.guests[who].engine.transmit;
        let mut frames = Vec::new();
        while let Some(frame) = transmit.first_frame() {
            let frame = frame.to_vec();
            transmit.consume(4 + frame.len());
            assert!(
                frame[0] == 0xff || frame[0] == 0x33 || frame[..6] == mac(who).0,
                "to the guest's own MAC"
            );
            frames.push(frame);
        }
        frames
    }

    /// Takes the packets that were sent to a guest.
    pub(super) fn packets(&mut self, who: usize) -> Vec<Vec<u8>> {
        self.frames(who).into_iter().map(|f| f[14..].to_vec()).collect()
    }

    /// Takes the only segment that was sent to a guest, which is no other's: flags, sequence, acknowledgement.
    #[track_caller]
    pub(super) fn only_segment(&mut self, who: usize) -> (u8, u32, u32) {
        let packets = self.packets(who);
        assert_eq!(packets.len(), 1, "{} packets were sent", packets.len());
        let ip = Ipv4Packet::new_checked(&packets[0]).unwrap();
        assert_eq!(IpAddr::V4(ip.dst_addr()), IpAddr::V4(address(who)));
        let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
        (
            ip.payload()[13] & 0x3f,
            tcp.seq_number().0 as u32,
            tcp.ack_number().0 as u32,
        )
    }

    /// Takes the reports of a guest since the last call.
    pub(super) fn reports(&mut self, who: usize) -> Vec<Report> {
        std::mem::take(&mut self.guests[who].reports)
    }

    /// Takes the misses of a guest since the last call.
    pub(super) fn misses(&mut self, who: usize) -> Vec<Miss> {
        let of = |report| {
            if let Report::Miss(miss) = report {
                Some(miss)
            } else {
                None
            }
        };
        self.reports(who).into_iter().filter_map(of).collect()
    }

    pub(super) fn answer(&mut self, who: usize, miss: &Miss, action: VerdictAction) {
        self.order(who, Order::Verdict(Box::new(verdict(miss, action))));
    }

    /// Answers the only question of a guest.
    #[track_caller]
    pub(super) fn answer_only(&mut self, who: usize, action: VerdictAction) -> Miss {
        let mut misses = self.misses(who);
        assert_eq!(misses.len(), 1, "{misses:?}");
        let miss = misses.remove(0);
        self.answer(who, &miss, action);
        miss
    }

    /// A guest sends a segment.
    pub(super) fn tcp(&mut self, from: (usize, u16), to: (usize, u16), flags: u8, numbers: (u32, u32)) {
        self.ip(from.0, &segment(from, to, flags, numbers, &[]));
    }

    /// A connection from Ann's port 40000 to Bob's port 80 as far as the handshake: Ann has sent up to 1001,
    /// Bob up to 5001.
    #[track_caller]
    pub(super) fn connect(&mut self) -> FlowOpened {
        self.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
        self.answer_only(ANN, VerdictAction::Allow);
        assert_eq!(self.only_segment(BOB), (SYN, 1000, 0));
        self.tcp((BOB, 80), (ANN, 40_000), SYN_ACK, (5000, 1001));
        assert_eq!(self.only_segment(ANN), (SYN_ACK, 5000, 1001));
        self.tcp((ANN, 40_000), (BOB, 80), ACK, (1001, 5001));
        assert_eq!(self.only_segment(BOB), (ACK, 1001, 5001));
        opened(&self.reports(ANN)).remove(0)
    }

    /// Opens a UDP association.
    #[track_caller]
    pub(super) fn associate(&mut self, from: (usize, u16), to: (usize, u16)) -> FlowOpened {
        self.ip(from.0, &datagram(from, to, b"first"));
        self.answer_only(from.0, VerdictAction::Allow);
        assert_eq!(self.packets(to.0), [datagram(from, to, b"first")]);
        opened(&self.reports(from.0)).remove(0)
    }
}

pub(super) fn segment(
    from: (usize, u16),
    to: (usize, u16),
    flags: u8,
    (sequence, acknowledgement): (u32, u32),
    payload: &[u8],
) -> Vec<u8> {
    let mut tcp = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    tcp.extend_from_slice(&sequence.to_be_bytes());
    tcp.extend_from_slice(&acknowledgement.to_be_bytes());
    tcp.extend_from_slice(&[5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend_from_slice(payload);
    ipv4(address(from.0), address(to.0), 6, &tcp)
}

pub(super) fn datagram(from: (usize, u16), to: (usize, u16), payload: &[u8]) -> Vec<u8> {
    let mut udp = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    udp.extend_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(payload);
    ipv4(address(from.0), address(to.0), 17, &udp)
}

pub(super) fn echo(from: usize, to: usize, kind: u8, identifier: u16) -> Vec<u8> {
    let mut icmp = vec![kind, 0, 0, 0];
    icmp.extend_from_slice(&identifier.to_be_bytes());
    icmp.extend_from_slice(&[0, 1, b'x']);
    ipv4(address(from), address(to), 1, &icmp)
}

/// An ICMP error (port unreachable) about a packet.
pub(super) fn error_about(packet: &[u8], from: usize, to: usize) -> Vec<u8> {
    let quote = &packet[..packet.len().min(28)];
    ipv4(
        address(from),
        address(to),
        1,
        &[&[3, 3, 0, 0, 0, 0, 0, 0], quote].concat(),
    )
}

pub(super) fn opened(reports: &[Report]) -> Vec<FlowOpened> {
    let of = |report: &Report| {
        if let Report::FlowOpened(opened) = report {
            Some(opened.clone())
        } else {
            None
        }
    };
    reports.iter().filter_map(of).collect()
}

/// Flows that ended: which, how, bytes up and down.
pub(super) fn closed(reports: &[Report]) -> Vec<(FlowId, FlowEnd, u64, u64)> {
    let of = |report: &Report| match report {
        Report::FlowClosed {
            flow,
            end,
            bytes_up,
            bytes_down,
            ..
        } => Some((*flow, *end, *bytes_up, *bytes_down)),
        _ => None,
    };
    reports.iter().filter_map(of).collect()
}

pub(super) fn has_guest_guard(miss: &Miss) -> bool {
    match &miss.subject {
        vnet_proto::model::Subject::Flow(flow) => flow.guards.contains(Guard::Guest),
        vnet_proto::model::Subject::Lookup(_) => false,
    }
}
