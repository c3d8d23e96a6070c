//! What is refused, and who makes way, when the host's descriptors are few; what becomes of connections when
//! their VM has no buffer memory left.

use std::convert::Infallible;
use std::time::Duration;

use vnet_proto::model::VerdictAction;

use super::kit::*;
use crate::descriptors::{Descriptors, PER_GUEST, RESERVE_MIN};
use crate::engine::Event;
use crate::engine::frame::DropReason;
use crate::engine::ring::{FIRST_BYTES, GROWTH_BYTES_MAX, RECEIVE_BYTES, RingPool, SEND_BYTES};
use crate::engine::tcp::DialError;
use crate::message::{FlowEnd, Report};

/// Room for so many flows of a guest alone; one more is kept for another guest.
fn descriptors(flows: usize) -> Descriptors {
    Descriptors::new(RESERVE_MIN + PER_GUEST + flows + 1)
}

fn is_opened(report: &Report) -> bool {
    matches!(report, Report::FlowOpened(_))
}

#[test]
fn a_flow_for_which_no_descriptor_is_left_is_refused_and_counted() {
    let mut rig = Rig::with_descriptors(&descriptors(2));
    let (at, _) = rig.connect((SERVER, 1));
    rig.connect((SERVER, 2));
    rig.reports();

    // Held, and then let through: there is no room by now.
    rig.syn((SERVER, 3));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(rig.only_segment().0, 0x14);
    // And by the cache.
    rig.syn((SERVER, 3));
    assert_eq!(rig.only_segment().0, 0x14);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    assert!(!rig.reports().iter().any(is_opened), "nothing opened");
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 2);

    // The same for datagrams.
    let datagram = udp((SERVER, 4), b"x");
    rig.ip(&datagram);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    rig.frames();
    rig.ip(&datagram);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Send { .. })));
    // And for a forward.
    let target = "192.168.127.2:22".parse().unwrap();
    assert!(rig.engine.open_ingress(rig.now, None, target, None).is_none());
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 4);
    assert_eq!(rig.engine.counters()["descriptors_refused"], 5);
    assert_eq!(rig.engine.flow_count(), 2);

    // One ends; there is room when its socket is closed, not before.
    rig.engine.handle_host_reset(rig.now, at);
    rig.frames();
    rig.syn((SERVER, 3));
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    rig.events.clear();
    rig.syn((SERVER, 3));
    rig.only_dial();
}

#[test]
fn a_guest_that_makes_way_gives_up_what_was_idle_longest() {
    let mut rig = Rig::new();
    let first = rig.connect((SERVER, 1)).0;
    rig.wait(Duration::from_secs(1));
    let second = rig.connect((SERVER, 2)).0;
    rig.wait(Duration::from_secs(1));
    let third = rig.connect((SERVER, 3)).0;
    rig.engine.count_bytes(rig.now, first, 1, 0);
    rig.reports();

    rig.engine.make_way(rig.now, 1);
    rig.service();

    assert_eq!(rig.only_segment().0 & 4, 4, "the guest is told");
    let closed =
        |e: &Event| matches!(e, Event::Close { flow, reset: true, descriptor: Some(_) } if *flow == second);
    assert!(rig.events.iter().any(closed));
    let evicted = |r: &Report| {
        matches!(
            r,
            Report::FlowClosed {
                end: FlowEnd::Evicted,
                ..
            }
        )
    };
    assert!(rig.reports().iter().any(evicted));
    assert!(rig.engine.flow(first).is_some() && rig.engine.flow(third).is_some());
    // More than there are is all.
    rig.engine.make_way(rig.now, 100);
    assert_eq!(rig.engine.flow_count(), 0);
    assert_eq!(rig.engine.counters()["flows_made_way"], 3);
}

#[test]
fn a_guest_below_its_share_is_served_while_another_makes_way() {
    let shared = Descriptors::new(RESERVE_MIN + 2 * PER_GUEST + 32);
    let hog = shared.attach(vnet_proto::model::VmId(9)).unwrap();
    let held: Vec<_> = std::iter::from_fn(|| hog.take().descriptor).collect();
    let mut rig = Rig::with_descriptors(&shared);
    rig.syn((SERVER, 1));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let asked = |e: &Event| matches!(e, Event::MakeWay { vm, count } if vm.0 == 9 && *count > 0);
    assert!(
        rig.events.iter().any(asked),
        "{} taken, {:?}",
        held.len(),
        rig.events
    );
    rig.only_dial();
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 0);
}

#[test]
fn a_dial_that_the_host_itself_refuses_is_counted() {
    let mut rig = Rig::new();
    rig.syn((SERVER, 80));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    rig.engine.handle_refused(rig.now, at, DialError::Local);
    assert_eq!(rig.only_icmp(), (3, 1));
    assert_eq!(rig.engine.counters()["dials_failed"], 1);
}

const WEB: (std::net::Ipv4Addr, u16) = (SERVER, 80);

/// Fills what goes to the guest once with `byte`s; how many it took.
fn fill(rig: &mut Rig, at: usize, byte: u8) -> usize {
    let connection = rig.engine.connection(at).unwrap();
    let filled = connection.lend_room(|room| {
        room.fill(byte);
        Ok::<_, Infallible>(room.len())
    });
    filled.unwrap()
}

/// The window that the last segment to the guest tells, unscaled.
fn told_window(packet: &[u8]) -> u16 {
    u16::from_be_bytes([packet[34], packet[35]])
}

#[test]
fn a_connection_without_memory_to_grow_is_slower_and_loses_nothing() {
    let mut rig = Rig::new();
    rig.engine.rings = RingPool::new(0, 0);
    let (at, sequence) = rig.connect(WEB);
    let data: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let (mut given, mut got) = (0, Vec::new());
    let mut turns = 0;
    while got.len() < data.len() {
        turns += 1;
        assert!(turns < 10_000, "it stands still at {}", got.len());
        let moved = rig.engine.connection(at).unwrap().lend_room(|room| {
            assert!(room.len() <= FIRST_BYTES);
            let length = room.len().min(data.len() - given);
            room[..length].copy_from_slice(&data[given..given + length]);
            Ok::<_, Infallible>(length)
        });
        given += moved.unwrap();
        rig.engine.finish_service(rig.now, at);
        for packet in rig.sent() {
            got.extend_from_slice(&packet[40..]);
        }
        // All but the last byte, so that the ring is never empty by itself.
        let acknowledged = if turns % 3 == 0 {
            got.len()
        } else {
            got.len().saturating_sub(1)
        };
        rig.tcp(WEB, 0x10, 1001, sequence.wrapping_add(acknowledged as u32), &[]);
        rig.service();
    }
    assert!(got == data, "other bytes than were given");

    // Towards the host: the window that the guest is told is no more than there is.
    let mut sent = 0;
    while sent < 100_000u32 {
        let payload = vec![(sent % 251) as u8; 1_000];
        rig.tcp(
            WEB,
            0x10,
            1001 + sent,
            sequence.wrapping_add(got.len() as u32),
            &payload,
        );
        sent += 1_000;
        let mut taken = 0;
        // In two pieces where the ring goes round.
        for _ in 0..2 {
            let piece = rig.engine.connection(at).unwrap().lend_received(|bytes| {
                assert!(bytes.iter().all(|byte| *byte == payload[0]));
                Ok::<_, Infallible>(bytes.len())
            });
            taken += piece.unwrap();
        }
        assert_eq!(taken, payload.len());
        rig.service();
        assert!(
            rig.sent()
                .iter()
                .all(|packet| usize::from(told_window(packet)) <= FIRST_BYTES)
        );
    }
    assert_eq!(rig.engine.counters()["ring_growth_refused"], 1, "counted once");
}

#[test]
fn connections_that_stand_still_take_no_more_than_their_vm_may() {
    let mut rig = Rig::new();
    let one = SEND_BYTES - FIRST_BYTES;
    rig.engine.rings = RingPool::new(GROWTH_BYTES_MAX, 2 * one);
    let places: Vec<usize> = (1..=10).map(|port| rig.connect((SERVER, port)).0).collect();
    // The guest acknowledges nothing; the hosts send what they can.
    let mut held = vec![0; places.len()];
    for _ in 0..1_000 {
        for (at, held) in places.iter().zip(&mut held) {
            *held += fill(&mut rig, *at, 7);
            rig.engine.finish_service(rig.now, *at);
            rig.frames();
        }
    }
    let grown: usize = held.iter().map(|held| held - FIRST_BYTES).sum();
    assert!(grown <= 2 * one && grown > one, "{held:?}");
    assert!(rig.engine.counters()["ring_growth_refused"] > 0);

    // They end, and there is room again.
    for at in places {
        rig.engine.handle_host_reset(rig.now, at);
    }
    rig.frames();
    rig.events.clear();
    let (at, _) = rig.connect((SERVER, 11));
    let all: usize = (0..10).map(|_| fill(&mut rig, at, 7)).sum();
    assert_eq!(all, SEND_BYTES);
}

#[test]
fn memory_that_a_connection_grew_by_is_given_back_when_it_is_idle() {
    let mut rig = Rig::new();
    rig.engine.rings = RingPool::new(GROWTH_BYTES_MAX, SEND_BYTES - FIRST_BYTES);
    let (first, sequence) = rig.connect((SERVER, 1));
    let (second, _) = rig.connect((SERVER, 2));
    let filled: usize = (0..10).map(|_| fill(&mut rig, first, 1)).sum();
    assert_eq!(filled, SEND_BYTES);
    rig.engine.count_bytes(rig.now, first, 0, filled);
    assert_eq!(
        (0..10).map(|_| fill(&mut rig, second, 2)).sum::<usize>(),
        FIRST_BYTES
    );
    // The guest takes it all.
    let mut got = 0;
    while got < filled {
        rig.engine.finish_service(rig.now, first);
        let payload: usize = rig
            .sent()
            .iter()
            .filter(|p| p[21] == 1)
            .map(|p| p.len() - 40)
            .sum();
        got += payload;
        assert_ne!(payload, 0, "it stands still at {got}");
        rig.tcp((SERVER, 1), 0x10, 1001, sequence.wrapping_add(got as u32), &[]);
    }
    rig.wait(Duration::from_secs(11));
    rig.frames();
    assert!(
        (0..10).map(|_| fill(&mut rig, second, 2)).sum::<usize>() > 0,
        "it grows now"
    );
}

#[test]
fn no_size_of_ring_can_be_made_to_panic_by_a_window_beyond_its_scale() {
    let mut seen = Vec::new();
    // As much as is left for the ring of one connection.
    for left in [GROWTH_BYTES_MAX, 2 << 20, 256 << 10, 0] {
        let mut rig = Rig::with_mtu(65_520);
        rig.engine.rings = RingPool::new(left, 0);
        let (at, sequence) = rig.connect(WEB);
        let end = RECEIVE_BYTES as u32;
        rig.tcp(WEB, 0x10, 1001 + end - 100, sequence, &[1; 60_000]);
        for start in (0..end).step_by(60_000) {
            rig.tcp(WEB, 0x10, 1001 + start, sequence, &[2; 60_000]);
            rig.engine.finish_service(rig.now, at);
        }
        let mut got = 0;
        loop {
            let taken = rig
                .engine
                .connection(at)
                .unwrap()
                .lend_received(|b| Ok::<_, Infallible>(b.len()));
            match taken.unwrap() {
                0 => break,
                length => got += length,
            }
        }
        seen.push(got);
    }
    assert!(seen.is_sorted_by(|a, b| a > b), "each is another size: {seen:?}");
    assert_eq!(seen, [RECEIVE_BYTES, 65_535, 16 << 10, FIRST_BYTES]);
}
