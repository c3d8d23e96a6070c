//! The scripted guest and what it is given.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use smoltcp::wire::{Icmpv4Packet, Ipv4Packet, TcpPacket, UdpPacket};
use vnet_proto::model::{
    Epoch, FlowMatch, Guard, GuardSet, LookupMatch, Match, Miss, MissId, NameDemand, Protocol, Reason,
    Subject, Verdict, VerdictAction, VmId,
};

use crate::descriptors::Descriptors;
use crate::engine::discovery::Ipv6Config;
use crate::engine::gateway::dhcp::{DhcpIgnored, DhcpOutcome};
use crate::engine::gateway::dns::zones::Zones;
use crate::engine::nat::Nat;
use crate::engine::switch::Neighbour;
use crate::engine::{Engine, EngineConfig, Event, Outcome, Surroundings, Time};
use crate::mac::Mac;
use crate::message::{Order, Report, Settings};

pub(super) const GUEST_MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);
pub(super) const NEIGHBOUR_MAC: Mac = Mac([2, 0, 0, 0, 0, 3]);
pub(super) const GATEWAY_MAC: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 2);
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);
pub(super) const ALIAS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);
pub(super) const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// An address that the host has.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 77);
pub(super) const EPOCH: Epoch = Epoch {
    incarnation: 7,
    counter: 1,
};
pub(super) const HOLD: Duration = Duration::from_secs(30);
/// A DHCP message that [`Alone`] has no address for.
pub(super) const NO_ADDRESS: &[u8] = b"no address";

/// Surroundings in which this guest is alone but for one neighbour.
#[derive(Default)]
pub(super) struct Alone {
    pub(super) neighbour: Mutex<Option<Ipv4Addr>>,
    pub(super) neighbour_ipv6: Mutex<Vec<Ipv6Addr>>,
    pub(super) released: Mutex<Vec<Ipv6Addr>>,
    pub(super) no_ipv6: std::sync::atomic::AtomicBool,
    /// Ports where a daemon listens, beside 4444.
    pub(super) closed: Mutex<Vec<u16>>,
}

impl Surroundings for Alone {
    fn claim(&self, _: VmId, _: Mac, address: IpAddr, _: Time) -> bool {
        match address {
            IpAddr::V4(v4) => *self.neighbour.lock().unwrap() != Some(v4),
            IpAddr::V6(v6) => !self.neighbour_ipv6.lock().unwrap().contains(&v6),
        }
    }
    fn release(&self, _: VmId, address: Ipv6Addr) {
        self.released.lock().unwrap().push(address);
    }
    fn has_ipv6(&self) -> bool {
        !self.no_ipv6.load(std::sync::atomic::Ordering::Relaxed)
    }
    fn has_way(&self, _: IpAddr) -> bool {
        self.has_ipv6()
    }
    fn learn_mac(&self, _: VmId, _: Mac) -> bool {
        true
    }
    fn dhcp(&self, _: VmId, _: Mac, message: &[u8], _: Time) -> DhcpOutcome {
        DhcpOutcome {
            ignored: (message == NO_ADDRESS).then_some(DhcpIgnored::NoAddress),
            ..DhcpOutcome::default()
        }
    }
    fn neighbour(&self, address: IpAddr) -> Option<Neighbour> {
        let there = match address {
            IpAddr::V4(v4) => *self.neighbour.lock().unwrap() == Some(v4),
            IpAddr::V6(v6) => self.neighbour_ipv6.lock().unwrap().contains(&v6),
        };
        there.then_some(Neighbour {
            vm: VmId(9),
            mac: NEIGHBOUR_MAC,
            open: false,
        })
    }
    fn guards(&self, dialled: SocketAddr, _: Protocol) -> GuardSet {
        let mut guards = GuardSet::EMPTY;
        if dialled.ip().is_loopback() || dialled.ip() == HOST {
            guards = guards.with(Guard::Host);
        }
        if dialled.port() == 4444 || self.closed.lock().unwrap().contains(&dialled.port()) {
            guards = guards.with(Guard::Daemon);
        }
        guards
    }
    fn zones(&self) -> Arc<Zones> {
        Arc::new(Zones::default())
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("network_lease_exhausted", 0), ("network_resolver_busy", 3)]
    }
}

/// An engine with its guest.
pub(super) struct Rig {
    pub(super) engine: Engine,
    pub(super) now: Time,
    pub(super) surroundings: Arc<Alone>,
    pub(super) events: Vec<Event>,
}

impl Rig {
    /// A guest under an epoch and a lease, which has said nothing yet.
    pub(super) fn new() -> Self {
        Self::with_mtu(1500)
    }

    pub(super) fn with_mtu(mtu_bytes: usize) -> Self {
        Self::with(mtu_bytes, None)
    }

    /// The same on a network that carries IPv6 too.
    pub(super) fn dual() -> Self {
        let search = vec!["lab.test".parse().unwrap()];
        let ipv6 = Ipv6Config::new("fd00::/64".parse().unwrap(), search);
        Self::with(1500, Some(ipv6))
    }

    /// The same in a process that may have so many descriptors.
    pub(super) fn with_descriptors(descriptors: &Descriptors) -> Self {
        Self::with_all(1500, None, descriptors, None)
    }

    fn with(mtu_bytes: usize, ipv6: Option<Ipv6Config>) -> Self {
        Self::with_all(mtu_bytes, ipv6, &Descriptors::new(1 << 20), None)
    }

    /// A guest whose link may have this MAC address alone.
    pub(super) fn pinned(mac: Mac) -> Self {
        Self::with_all(1500, None, &Descriptors::new(1 << 20), Some(mac))
    }

    fn with_all(
        mtu_bytes: usize,
        ipv6: Option<Ipv6Config>,
        descriptors: &Descriptors,
        pinned_mac: Option<Mac>,
    ) -> Self {
        let config = EngineConfig {
            vm: VmId(1),
            gateway: GATEWAY,
            gateway_mac: GATEWAY_MAC,
            subnet: "192.168.127.0/24".parse().unwrap(),
            nat: Arc::new(Nat::new([(ALIAS, Ipv4Addr::LOCALHOST.into())], [ALIAS])),
            ipv6,
            mtu_bytes,
            pinned_mac,
            flows_max: 64,
            descriptors: descriptors.attach(VmId(1)).unwrap(),
            hold: HOLD,
            lookup_hold: Duration::from_secs(4),
            seed: [7; 32],
        };
        let surroundings = Arc::new(Alone::default());
        let engine = Engine::new(
            config,
            Arc::clone(&surroundings) as Arc<dyn Surroundings>,
            "vm".into(),
        );
        let mut rig = Self {
            engine,
            now: Time::from_secs(100),
            surroundings,
            events: Vec::new(),
        };
        rig.order(Order::Revoke {
            command: None,
            epoch: EPOCH,
        });
        rig.order(Order::Lease {
            epoch: EPOCH,
            lease: Duration::from_secs(3600),
        });
        rig
    }

    pub(super) fn order(&mut self, order: Order) {
        self.engine.handle_order(self.now, order);
        self.collect();
    }

    /// What was decided before is void from now on; a new epoch is in force, and leased for a minute.
    pub(super) fn next_epoch(&mut self) {
        let epoch = EPOCH.next();
        self.order(Order::Revoke { command: None, epoch });
        self.order(Order::Lease {
            epoch,
            lease: Duration::from_secs(60),
        });
    }

    /// The guest sends a frame to the gateway.
    pub(super) fn frame(&mut self, ether_type: u16, packet: &[u8]) {
        self.frame_from(GUEST_MAC, ether_type, packet);
    }

    pub(super) fn frame_from(&mut self, source: Mac, ether_type: u16, packet: &[u8]) {
        let mut frame = [GATEWAY_MAC.0, source.0].concat();
        frame.extend_from_slice(&ether_type.to_be_bytes());
        frame.extend_from_slice(packet);
        match self.engine.handle_frame(self.now, &frame) {
            Outcome::Datagram { flow, payload }
            | Outcome::Echo {
                flow,
                message: payload,
            } => {
                self.events.push(Event::Send {
                    flow,
                    packets: vec![payload.into()],
                });
            }
            Outcome::Assembled { flow, payload } => {
                self.events.push(Event::Send {
                    flow,
                    packets: vec![payload.into()],
                });
            }
            Outcome::Datagrams { flow, payloads } => {
                self.events.push(Event::Send {
                    flow,
                    packets: payloads,
                });
            }
            Outcome::Pass { flow, packet } => {
                self.events.push(Event::Pass {
                    flow,
                    packets: vec![packet.into()],
                });
            }
            Outcome::Done | Outcome::Switch(_) => {}
        }
        self.collect();
    }

    pub(super) fn ip(&mut self, packet: &[u8]) {
        self.frame(0x0800, packet);
    }

    /// The guest sends a TCP segment.
    pub(super) fn tcp(
        &mut self,
        peer: (Ipv4Addr, u16),
        flags: u8,
        sequence: u32,
        acknowledgement: u32,
        payload: &[u8],
    ) {
        self.ip(&segment(peer, flags, sequence, acknowledgement, payload));
    }

    pub(super) fn syn(&mut self, peer: (Ipv4Addr, u16)) {
        self.tcp(peer, 2, 1000, 0, &[]);
    }

    pub(super) fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.engine.poll_timeout().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.engine.handle_timeout(self.now);
            self.service();
        }
        self.now = end;
        self.engine.handle_timeout(self.now);
        self.service();
    }

    /// Lets connections send what they have.
    pub(super) fn service(&mut self) {
        let mut dirty = Vec::new();
        self.engine.take_dirty(&mut dirty);
        for at in dirty {
            self.engine.finish_service(self.now, at);
        }
        self.collect();
    }

    fn collect(&mut self) {
        while let Some(event) = self.engine.poll_event() {
            self.events.push(event);
        }
    }

    /// Takes what the engine has sent to the guest: IP packets.
    pub(super) fn sent(&mut self) -> Vec<Vec<u8>> {
        self.frames()
            .into_iter()
            .filter(|f| f[12..14] == [8, 0])
            .map(|f| f[14..].to_vec())
            .collect()
    }

    pub(super) fn frames(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some(frame) = self.engine.transmit.first_frame() {
            let frame = frame.to_vec();
            self.engine.transmit.consume(4 + frame.len());
            frames.push(frame);
        }
        frames
    }

    /// Takes the only TCP segment sent: flags, sequence, acknowledgement, payload.
    pub(super) fn only_segment(&mut self) -> (u8, u32, u32, Vec<u8>) {
        let sent = self.sent();
        assert_eq!(sent.len(), 1, "{} packets were sent", sent.len());
        let ip = Ipv4Packet::new_checked(&sent[0]).unwrap();
        assert!(ip.verify_checksum());
        let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
        assert!(tcp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
        (
            ip.payload()[13] & 0x3f,
            tcp.seq_number().0 as u32,
            tcp.ack_number().0 as u32,
            tcp.payload().to_vec(),
        )
    }

    /// Takes the only ICMP message sent: type and code.
    pub(super) fn only_icmp(&mut self) -> (u8, u8) {
        let sent = self.sent();
        assert_eq!(sent.len(), 1, "{} packets were sent", sent.len());
        let ip = Ipv4Packet::new_checked(&sent[0]).unwrap();
        let message = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert!(message.verify_checksum());
        (ip.payload()[0], ip.payload()[1])
    }

    /// Takes the only UDP datagram sent: source port and payload.
    pub(super) fn only_datagram(&mut self) -> (u16, Vec<u8>) {
        let sent = self.sent();
        assert_eq!(sent.len(), 1, "{} packets were sent", sent.len());
        let ip = Ipv4Packet::new_checked(&sent[0]).unwrap();
        let udp = UdpPacket::new_checked(ip.payload()).unwrap();
        assert!(udp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
        (udp.src_port(), udp.payload().to_vec())
    }

    /// Takes the reports since the last call.
    pub(super) fn reports(&mut self) -> Vec<Report> {
        let (reports, others) = std::mem::take(&mut self.events)
            .into_iter()
            .partition::<Vec<_>, _>(|e| matches!(e, Event::Report(_)));
        self.events = others;
        reports
            .into_iter()
            .filter_map(|e| if let Event::Report(r) = e { Some(*r) } else { None })
            .collect()
    }

    /// Takes the misses since the last call.
    pub(super) fn misses(&mut self) -> Vec<Miss> {
        self.reports()
            .into_iter()
            .filter_map(|r| if let Report::Miss(m) = r { Some(m) } else { None })
            .collect()
    }

    /// Takes the place of the only dial asked for.
    pub(super) fn only_dial(&mut self) -> (usize, SocketAddr) {
        let dials: Vec<_> = std::mem::take(&mut self.events)
            .into_iter()
            .filter_map(|e| {
                if let Event::Dial { flow, to } = e {
                    Some((flow, to))
                } else {
                    None
                }
            })
            .collect();
        assert_eq!(dials.len(), 1, "{dials:?}");
        dials[0]
    }

    pub(super) fn answer(&mut self, miss: &Miss, action: VerdictAction) {
        self.order(Order::Verdict(Box::new(verdict(miss, action))));
    }

    /// Opens a connection to `peer` as far as the guest's handshake; its place, and the sequence number
    /// that the gateway's side continues with.
    pub(super) fn connect(&mut self, peer: (Ipv4Addr, u16)) -> (usize, u32) {
        self.syn(peer);
        let miss = self.misses().remove(0);
        self.answer(&miss, VerdictAction::Allow);
        let (at, _) = self.only_dial();
        self.engine.handle_dialled(self.now, at);
        self.service();
        let (flags, sequence, acknowledgement, _) = self.only_segment();
        assert_eq!((flags, acknowledgement), (0x12, 1001));
        self.tcp(peer, 0x10, 1001, sequence + 1, &[]);
        self.service();
        self.sent();
        (at, sequence + 1)
    }
}

/// An exact verdict on a miss.
pub(super) fn verdict(miss: &Miss, action: VerdictAction) -> Verdict {
    let found = match &miss.subject {
        Subject::Flow(flow) => Match::Flow(FlowMatch::exact(&flow.key)),
        Subject::Lookup(lookup) if lookup.alias => Match::Alias(LookupMatch::Exact(lookup.name.clone())),
        Subject::Lookup(lookup) => Match::Lookup(LookupMatch::Exact(lookup.name.clone())),
    };
    Verdict {
        miss: miss.id,
        action,
        found,
        epoch: EPOCH,
        expires_in: None,
        once: false,
        budget: None,
        grant: String::new(),
        reason: Reason::new("rule", "rules[0]", "because"),
        would_deny: false,
        synthetic_only: false,
        name_demand: NameDemand::Off,
        names: Vec::new(),
    }
}

/// An allow of every lookup, in answer to one.
pub(super) fn every_lookup(miss: &Miss) -> Verdict {
    Verdict {
        found: Match::Lookup(LookupMatch::Any),
        ..verdict(miss, VerdictAction::Allow)
    }
}

/// How a guest is treated of which nothing is said.
pub(super) fn settings() -> Settings {
    Settings::unsaid("vm".into(), Duration::from_secs(4), HOLD)
}

pub(super) fn ended(reports: &[Report]) -> Vec<(MissId, crate::message::MissEnd)> {
    reports
        .iter()
        .filter_map(|r| {
            if let Report::MissEnded { miss, end } = r {
                Some((*miss, *end))
            } else {
                None
            }
        })
        .collect()
}

pub(super) fn segment(
    peer: (Ipv4Addr, u16),
    flags: u8,
    sequence: u32,
    acknowledgement: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend_from_slice(&40_000u16.to_be_bytes());
    tcp.extend_from_slice(&peer.1.to_be_bytes());
    tcp.extend_from_slice(&sequence.to_be_bytes());
    tcp.extend_from_slice(&acknowledgement.to_be_bytes());
    tcp.extend_from_slice(&[
        if flags & 2 != 0 { 7 << 4 } else { 5 << 4 },
        flags,
        0xff,
        0xff,
        0,
        0,
        0,
        0,
    ]);
    if flags & 2 != 0 {
        // MSS 1460, window scale 7.
        tcp.extend_from_slice(&[2, 4, 5, 0xb4, 3, 3, 7, 1]);
    }
    tcp.extend_from_slice(payload);
    ipv4(GUEST, peer.0, 6, &tcp)
}

pub(super) fn udp(peer: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut udp = Vec::new();
    udp.extend_from_slice(&50_000u16.to_be_bytes());
    udp.extend_from_slice(&peer.1.to_be_bytes());
    udp.extend_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(payload);
    ipv4(GUEST, peer.0, 17, &udp)
}

pub(super) fn echo(peer: Ipv4Addr, identifier: u16, payload: &[u8]) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0];
    icmp.extend_from_slice(&identifier.to_be_bytes());
    icmp.extend_from_slice(&[0, 1]);
    icmp.extend_from_slice(payload);
    ipv4(GUEST, peer, 1, &icmp)
}

pub(super) fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
    packet.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&destination.octets());
    packet.extend_from_slice(payload);
    packet
}
