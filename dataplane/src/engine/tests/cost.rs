//! What a connection costs in instructions, and what a packet does, to be counted by callgrind:
//! `tests/bench/connect.py` runs it once for each scene and compares them.

use std::net::Ipv4Addr;

use vnet_proto::model::{
    FlowKey, FlowMatch, FlowSubject, GuardSet, Match, Miss, MissId, PortRange, Protocol, Subject,
    VerdictAction, VmId, parse_prefix,
};

use super::kit::*;
use crate::engine::{Engine, Event, Outcome, Time};
use crate::message::Order;

/// SSH: where a name need only match if there is one.
const PEER: (Ipv4Addr, u16) = (SERVER, 22);
/// Verdicts beside the one that is hit.
const OTHERS: u32 = 10_000;
const CONNECTIONS: u32 = 1_000;
/// Flows that are open where a packet has company: as many as the test's guest may have.
const FLOWS: u16 = 64;

/// Gives the engine a verdict of a policy in force that allows a match.
fn allow(rig: &mut Rig, prefix: &str, ports: PortRange) {
    let key = FlowKey {
        protocol: Protocol::Tcp,
        guest: (GUEST, 40_000).into(),
        peer: PEER.into(),
    };
    let miss = Miss {
        id: MissId(u64::MAX),
        vm: VmId(1),
        subject: Subject::Flow(FlowSubject {
            key,
            dialled: PEER.0.into(),
            names: Vec::new(),
            guards: GuardSet::EMPTY,
            peer_vm: None,
        }),
        hold: HOLD,
        held: 1,
    };
    let mut verdict = verdict(&miss, VerdictAction::Allow);
    verdict.found = Match::Flow(FlowMatch {
        prefix: parse_prefix(prefix).unwrap(),
        ports,
        ..FlowMatch::exact(&key)
    });
    rig.order(Order::Verdict(Box::new(verdict)));
}

/// A guest whose cache is as a scene says.
fn scene(name: &str) -> Rig {
    let mut rig = Rig::new();
    match name {
        // What `defaultAction: allow` alone makes of the first miss.
        "default" => allow(&mut rig, "200.0.0.0/6", PortRange::ALL),
        // The rule's own port and host, beside what many other rules and answers have left, in several shapes.
        "rules" => {
            for i in 0..OTHERS {
                let address = Ipv4Addr::from(0x0a00_0000 + i * 256);
                match i % 4 {
                    0 => allow(&mut rig, &format!("{address}/24"), PortRange::ALL),
                    1 => allow(&mut rig, &format!("{address}/32"), PortRange::ALL),
                    2 => allow(&mut rig, &format!("{address}/26"), PortRange::one(443)),
                    _ => allow(&mut rig, &format!("{address}/32"), PortRange::one(443)),
                }
            }
            allow(&mut rig, &SERVER.to_string(), PortRange::one(PEER.1));
        }
        other => panic!("there is no scene {other:?}"),
    }
    rig
}

/// One connection from the guest's SYN to the last acknowledgement, without a miss.
#[inline(never)]
fn one_connection(rig: &mut Rig) {
    rig.syn(PEER);
    let (at, _) = rig.only_dial();
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let (_, sequence, ..) = rig.only_segment();
    rig.tcp(PEER, 0x10, 1001, sequence + 1, &[]);
    rig.tcp(PEER, 0x11, 1001, sequence + 1, &[]);
    rig.service();
    rig.sent();
    rig.engine.connection(at).unwrap().close();
    rig.engine.finish_service(rig.now, at);
    rig.sent();
    rig.tcp(PEER, 0x10, 1002, sequence + 2, &[]);
    rig.service();
    let closes = |event: &Event| matches!(event, Event::Close { .. });
    assert!(rig.events.iter().any(closes));
    rig.events.clear();
}

#[test]
#[ignore = "a measurement: tests/bench/connect.py"]
fn connections() {
    let name = std::env::var("VNET_SCENE").unwrap_or_else(|_| "rules".to_owned());
    let mut rig = scene(&name);
    for _ in 0..CONNECTIONS {
        one_connection(&mut rig);
    }
    assert_eq!(rig.engine.flow_count(), 0);
    assert!(rig.misses().is_empty());
}

/// A flow's place and the next sequence numbers of both sides, with as many others open beside.
fn open_beside(rig: &mut Rig, others: u16) -> u32 {
    let mut sequence = 0;
    for port in 0..=others {
        let peer = (SERVER, PEER.1 + 1000 + port);
        rig.syn(peer);
        let (at, _) = rig.only_dial();
        rig.engine.handle_dialled(rig.now, at);
        rig.service();
        sequence = rig.only_segment().1;
        rig.tcp(peer, 0x10, 1001, sequence + 1, &[]);
        rig.service();
        rig.sent();
        rig.events.clear();
    }
    sequence
}

/// A frame of a flow that is open: in, taken, acknowledged. Nothing of the test's own is counted.
#[inline(never)]
fn one_packet(engine: &mut Engine, now: Time, frame: &[u8], at: usize) {
    assert!(matches!(engine.handle_frame(now, frame), Outcome::Done));
    let mut taken = 0;
    // Twice where the ring's end lies between.
    while taken < 1000 {
        let connection = engine.connection(at).unwrap();
        let length = connection.lend_received(|bytes| Ok::<_, std::convert::Infallible>(bytes.len()));
        taken += length.unwrap();
        assert_ne!(length, Ok(0));
    }
    engine.count_bytes(now, at, taken, 0);
    engine.finish_service(now, at);
    assert!(!engine.transmit.is_empty());
    engine.transmit.clear();
}

#[test]
#[ignore = "a measurement: tests/bench/connect.py"]
fn packets() {
    let name = std::env::var("VNET_SCENE").unwrap_or_else(|_| "others".to_owned());
    let others = if name == "alone" { 0 } else { FLOWS - 1 };
    let mut rig = Rig::new();
    allow(&mut rig, "200.0.0.0/6", PortRange::ALL);
    let sequence = open_beside(&mut rig, others);
    let (peer, at) = ((SERVER, PEER.1 + 1000 + others), usize::from(others));
    let frames: Vec<Vec<u8>> = (0..CONNECTIONS)
        .map(|number| {
            let packet = segment(peer, 0x18, 1001 + number * 1000, sequence + 1, &[7; 1000]);
            [&GATEWAY_MAC.0[..], &GUEST_MAC.0, &[8, 0], &packet].concat()
        })
        .collect();
    for frame in &frames {
        one_packet(&mut rig.engine, rig.now, frame, at);
    }
}

#[test]
fn in_every_scene_a_connection_is_a_hit() {
    for name in ["default", "rules"] {
        let mut rig = scene(name);
        one_connection(&mut rig);
        assert_eq!(rig.engine.flow_count(), 0);
    }
}
