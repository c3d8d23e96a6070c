//! TCP as the guest meets it.

use std::convert::Infallible;
use std::time::Duration;

use vnet_proto::model::VerdictAction;

use super::kit::*;
use crate::engine::Event;
use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::life::OPENING_PATIENCE;
use crate::engine::tcp::{DIAL_PATIENCE, DialError, TCP_IDLE};
use crate::message::{FlowEnd, MissEnd, Order, Report};

const WEB: (std::net::Ipv4Addr, u16) = (SERVER, 80);
const RST_ACK: u8 = 0x14;

#[test]
fn an_undecided_syn_is_held_unanswered_and_its_repetitions_join() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    assert_eq!(rig.misses().len(), 1);
    rig.wait(Duration::from_secs(1));
    rig.syn(WEB);
    rig.wait(Duration::from_secs(2));
    rig.syn(WEB);
    assert!(rig.misses().is_empty());
    assert!(rig.sent().is_empty());
}

#[test]
fn the_host_is_dialled_before_the_guest_is_answered() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, to) = rig.only_dial();
    assert_eq!(to, "203.0.113.9:80".parse().unwrap());
    rig.service();
    assert!(
        rig.sent().is_empty(),
        "answered before the host's side was connected"
    );
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let (flags, _, acknowledgement, _) = rig.only_segment();
    assert_eq!((flags, acknowledgement), (0x12, 1001));
}

#[test]
fn a_denied_syn_is_reset_at_once_and_a_dropped_one_is_not_answered() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Deny);
    let (flags, _, acknowledgement, _) = rig.only_segment();
    assert_eq!((flags, acknowledgement), (RST_ACK, 1001));
    rig.syn(WEB);
    assert!(rig.misses().is_empty(), "the cache answers the second");
    assert_eq!(rig.only_segment().0, RST_ACK);

    rig.syn((SERVER, 81));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Drop);
    rig.syn((SERVER, 81));
    assert!(rig.sent().is_empty() && rig.misses().is_empty());
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn unanswered_it_is_refused_after_the_hold() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    for pause in [1, 2, 4, 8, 14] {
        rig.wait(Duration::from_secs(pause));
        assert!(rig.sent().is_empty());
        rig.syn(WEB);
    }
    rig.wait(Duration::from_secs(1));
    assert_eq!(rig.only_segment().0, RST_ACK);
    assert_eq!(ended(&rig.reports()), [(miss.id, MissEnd::HoldExpired)]);
}

#[test]
fn a_person_being_asked_moves_the_deadline() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.order(Order::Held {
        miss: miss.id,
        hold: Duration::from_secs(2),
    });
    rig.wait(Duration::from_millis(1999));
    assert!(rig.sent().is_empty());
    rig.wait(Duration::from_millis(1));
    assert_eq!(rig.only_segment().0, RST_ACK);
}

#[test]
fn a_guest_that_stops_trying_has_given_up() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.wait(Duration::from_secs(1));
    rig.syn(WEB);
    rig.wait(Duration::from_secs(5));
    assert_eq!(ended(&rig.reports()), [(miss.id, MissEnd::GuestGaveUp)]);
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_reset_from_the_guest_ends_the_question() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.tcp(WEB, 4, 1001, 0, &[]);
    assert_eq!(ended(&rig.reports()), [(miss.id, MissEnd::GuestGaveUp)]);
    rig.answer(&miss, VerdictAction::Allow);
    assert!(
        rig.events.is_empty(),
        "a verdict for a closed flow dials nothing: {:?}",
        rig.events
    );
}

#[test]
fn a_dial_that_fails_looks_like_the_network() {
    for (error, expected) in [
        (DialError::HostUnreachable, (3, 1)),
        (DialError::NetworkUnreachable, (3, 0)),
        (DialError::TimedOut, (3, 1)),
    ] {
        let mut rig = Rig::new();
        rig.syn(WEB);
        let miss = rig.misses().remove(0);
        rig.answer(&miss, VerdictAction::Allow);
        let (at, _) = rig.only_dial();
        rig.engine.handle_refused(rig.now, at, error);
        assert_eq!(rig.only_icmp(), expected, "{error:?}");
    }
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    rig.engine.handle_refused(rig.now, at, DialError::Refused);
    assert_eq!(rig.only_segment().0, RST_ACK);
}

#[test]
fn a_dial_without_an_answer_is_given_up() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    rig.wait(DIAL_PATIENCE);
    assert_eq!(rig.only_icmp(), (3, 1));
    assert!(rig.events.iter().any(|e| matches!(e, Event::Close { .. })));
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn bytes_pass_both_ways_and_both_halves_close() {
    let mut rig = Rig::new();
    let (at, sequence) = rig.connect(WEB);
    rig.tcp(WEB, 0x18, 1001, sequence, b"hello");
    let connection = rig.engine.connection(at).unwrap();
    let mut got = Vec::new();
    connection
        .lend_received(|b| {
            got.extend_from_slice(b);
            Ok::<_, Infallible>(b.len())
        })
        .unwrap();
    assert_eq!(got, b"hello");
    connection
        .lend_room(|room| {
            room[..3].copy_from_slice(b"abc");
            Ok::<_, Infallible>(3)
        })
        .unwrap();
    rig.service();
    let (_, _, acknowledgement, payload) = rig.only_segment();
    assert_eq!((acknowledgement, payload.as_slice()), (1006, b"abc".as_slice()));

    // The guest finishes; the host may still send.
    rig.tcp(WEB, 0x11, 1006, sequence + 3, &[]);
    rig.service();
    assert!(rig.engine.connection(at).unwrap().is_received_whole());
    rig.sent();
    let connection = rig.engine.connection(at).unwrap();
    connection
        .lend_room(|room| {
            room[..4].copy_from_slice(b"more");
            Ok::<_, Infallible>(4)
        })
        .unwrap();
    connection.close();
    rig.engine.finish_service(rig.now, at);
    let payload: Vec<u8> = rig.sent().concat();
    assert!(payload.windows(4).any(|w| w == b"more"));
    rig.tcp(WEB, 0x10, 1007, sequence + 3 + 4 + 1, &[]);
    rig.service();
    assert!(
        rig.reports()
            .iter()
            .any(|r| matches!(r, Report::FlowClosed { .. }))
    );
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_reset_passes_both_ways() {
    let mut rig = Rig::new();
    let (at, sequence) = rig.connect(WEB);
    rig.tcp(WEB, 4, 1001, sequence, &[]);
    rig.service();
    assert!(
        rig.events
            .iter()
            .any(|e| matches!(e, Event::Close { flow, reset: true, .. } if *flow == at))
    );

    let mut rig = Rig::new();
    let (at, _) = rig.connect(WEB);
    rig.engine.handle_host_reset(rig.now, at);
    assert_eq!(rig.only_segment().0 & 4, 4);
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_guest_started_anew_may_use_its_port_again() {
    let mut rig = Rig::new();
    let (at, _) = rig.connect(WEB);
    rig.tcp(WEB, 2, 999_999, 0, &[]);
    let closed = |e: &Event| matches!(e, Event::Close { flow, .. } if *flow == at);
    assert!(rig.events.iter().any(closed));
    assert!(
        rig.events.iter().any(|e| matches!(e, Event::Dial { .. })),
        "the cache lets it dial anew"
    );
}

#[test]
fn a_segment_of_no_connection_is_reset() {
    let mut rig = Rig::new();
    rig.tcp(WEB, 0x10, 5, 77, &[]);
    let (flags, sequence, ..) = rig.only_segment();
    assert_eq!((flags, sequence), (4, 77));
    rig.tcp(WEB, 4, 5, 0, &[]);
    assert!(rig.sent().is_empty());
}

#[test]
fn a_place_is_not_taken_again_before_its_socket_is_closed() {
    let mut rig = Rig::new();
    let (at, _) = rig.connect(WEB);
    // The driver has not acted on the close when the next flow comes.
    rig.engine.handle_host_reset(rig.now, at);
    rig.syn((SERVER, 81));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    assert_ne!(rig.only_dial().0, at);
}

#[test]
fn the_limit_of_flows_refuses_and_counts() {
    let mut rig = Rig::new();
    for port in 1..=64 {
        rig.syn((SERVER, port));
    }
    assert!(rig.sent().is_empty());
    rig.syn((SERVER, 65));
    assert_eq!(rig.only_segment().0, RST_ACK);
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 1);
}

#[test]
fn nothing_is_offered_on_the_gateway_but_dns() {
    let mut rig = Rig::new();
    rig.syn((GATEWAY, 80));
    assert_eq!(rig.only_segment().0, RST_ACK);
    assert_eq!(rig.engine.dropped(DropReason::GatewayService), 1);
    assert!(rig.misses().is_empty());
}

#[test]
fn the_host_alias_is_dialled_as_loopback_and_guarded() {
    let mut rig = Rig::new();
    rig.syn((ALIAS, 80));
    let miss = rig.misses().remove(0);
    let vnet_proto::model::Subject::Flow(flow) = &miss.subject else {
        panic!()
    };
    assert!(flow.dialled.is_loopback() && flow.guards.contains(vnet_proto::model::Guard::Host));
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(rig.only_dial().1, "127.0.0.1:80".parse().unwrap());
}

#[test]
fn nothing_opens_an_address_where_a_daemon_listens() {
    let mut rig = Rig::new();
    rig.syn((SERVER, 4444));
    assert_eq!(rig.only_segment().0, RST_ACK);
    assert!(rig.misses().is_empty());
}

#[test]
fn what_goes_or_waits_to_go_where_a_daemon_listens_from_now_on_is_cut() {
    let mut rig = Rig::new();
    rig.connect(WEB);
    rig.syn((SERVER, 7778));
    let waits = rig.misses().remove(0);
    rig.surroundings.closed.lock().unwrap().push(7778);
    rig.order(Order::GuardsChanged);
    assert_eq!(rig.only_segment().0, RST_ACK);
    assert_eq!(rig.engine.flow_count(), 1, "what goes elsewhere lives on");
    rig.answer(&waits, VerdictAction::Allow);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));

    rig.surroundings.closed.lock().unwrap().push(WEB.1);
    rig.order(Order::GuardsChanged);
    assert_eq!(rig.only_segment().0 & 4, 4);
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn destinations_that_no_guest_may_have_are_dropped() {
    let mut rig = Rig::new();
    for address in [
        [127, 0, 0, 1],
        [0, 1, 2, 3],
        [224, 0, 0, 1],
        [255, 255, 255, 255],
        [240, 0, 0, 1],
    ] {
        rig.syn((address.into(), 80));
    }
    assert_eq!(rig.engine.dropped(DropReason::Destination), 5);
    assert!(rig.misses().is_empty() && rig.sent().is_empty());
}

#[test]
fn a_window_filled_beyond_its_scale_does_not_panic() {
    // After the SYN-ACK the stack books its unscaled window as if it were scaled: a guest that sends
    // past the ring and then fills the gap made it panic with a ring of another size.
    let mut rig = Rig::with_mtu(65_520);
    let (at, sequence) = rig.connect(WEB);
    let far = 1001 + 262_140;
    rig.tcp(WEB, 0x10, far - 100, sequence, &[1; 60_000]);
    for start in (0..262_140u32).step_by(60_000) {
        rig.tcp(
            WEB,
            0x10,
            1001 + start,
            sequence,
            &vec![2; 60_000.min(262_140 - start as usize + 500)],
        );
    }
    let mut got = 0;
    loop {
        let taken = rig.engine.connection(at).unwrap().lend_received(|b| {
            assert!(b.iter().all(|b| *b == 1 || *b == 2));
            Ok::<_, Infallible>(b.len())
        });
        match taken.unwrap() {
            0 => break,
            length => got += length,
        }
    }
    assert_eq!(got, 262_140);
}

/// A hypervisor that offloads hands over whole runs of bytes, far above the MTU, and leaves their checksums to a card
/// that is not there, and the length where 16 bits cannot hold it.
#[test]
fn a_frame_above_the_mtu_with_unfinished_checksums_is_taken_whole() {
    let mut rig = Rig::new();
    let (at, sequence) = rig.connect(WEB);
    let mut at_once = segment(WEB, 0x10, 1001, sequence, &[7; 40_000]);
    // Of the IP header, and what a stack puts where TCP's is to be: the sum of the pseudo-header alone.
    at_once[10..12].copy_from_slice(&[0xde, 0xad]);
    at_once[36..38].copy_from_slice(&[0xbe, 0xef]);
    rig.ip(&at_once);
    let mut rest = segment(WEB, 0x10, 41_001, sequence, &[7; 20_000]);
    rest[2..4].copy_from_slice(&[0, 0]);
    rig.ip(&rest);
    let (mut got, mut all_sevens) = (0, true);
    while let Ok(length @ 1..) = rig.engine.connection(at).unwrap().lend_received(|bytes| {
        all_sevens &= bytes.iter().all(|byte| *byte == 7);
        Ok::<_, Infallible>(bytes.len())
    }) {
        got += length;
    }
    assert_eq!((got, all_sevens), (60_000, true));
    assert_eq!(rig.engine.dropped(DropReason::Malformed), 0);
    // More than the length could say is no packet of IPv4.
    let mut beyond = segment(WEB, 0x10, 61_001, sequence, &[7; 66_000]);
    beyond[2..4].copy_from_slice(&[0, 0]);
    rig.ip(&beyond);
    assert_eq!(rig.engine.dropped(DropReason::Malformed), 1);
}

#[test]
fn a_silent_connection_ends_at_last() {
    let mut rig = Rig::new();
    let (at, _) = rig.connect(WEB);
    rig.wait(TCP_IDLE - Duration::from_secs(1));
    assert!(matches!(rig.engine.flow(at).unwrap().state, State::Tcp(_)));
    rig.wait(Duration::from_secs(1));
    let reports = rig.reports();
    assert!(reports.iter().any(|r| matches!(
        r,
        Report::FlowClosed {
            end: FlowEnd::Idle,
            ..
        }
    )));
}

/// Whether a flow ended for its idle time, and its host's side was reset.
pub(super) fn given_up(rig: &mut Rig, at: usize) -> bool {
    let reset = |e: &Event| matches!(e, Event::Close { flow, reset: true, .. } if *flow == at);
    let reset = rig.events.iter().any(reset);
    let idle = |r: &Report| {
        matches!(
            r,
            Report::FlowClosed {
                end: FlowEnd::Idle,
                ..
            }
        )
    };
    reset && rig.reports().iter().any(idle)
}

#[test]
fn a_handshake_that_the_guest_never_finishes_is_given_up_and_both_sides_are_reset() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    rig.wait(OPENING_PATIENCE - Duration::from_millis(1));
    assert_eq!(rig.engine.flow_count(), 1);
    let sent = rig.sent();
    assert!(sent.len() > 3, "the SYN-ACK is repeated: {}", sent.len());
    assert!(sent.iter().all(|packet| packet[33] & 0x3f == 0x12));

    // Repeating the SYN opens nothing, and buys no time.
    rig.syn(WEB);
    rig.wait(Duration::from_millis(1));

    assert_eq!(rig.only_segment().0 & 4, 4, "the guest's side is reset");
    assert!(given_up(&mut rig, at));
    assert_eq!(rig.engine.flow_count(), 0);
    assert_eq!(rig.engine.counters()["connections_unopened"], 1);
}

#[test]
fn a_connection_that_is_open_is_not_given_up_for_being_silent() {
    let mut rig = Rig::new();
    let (at, _) = rig.connect(WEB);
    rig.wait(OPENING_PATIENCE * 2);
    assert!(rig.engine.connection(at).is_some());
    assert_eq!(rig.engine.counters().get("connections_unopened"), None);
}

#[test]
fn timers_come_to_an_end_while_a_connection_has_something_to_send() {
    let mut rig = Rig::new();
    let (at, _) = rig.connect(WEB);
    rig.engine
        .connection(at)
        .unwrap()
        .lend_room(|room| {
            room[..5].copy_from_slice(b"hello");
            Ok::<_, Infallible>(5)
        })
        .unwrap();
    // The queue towards the guest is full, so the connection cannot send although it is due.
    while rig.engine.transmit.frame(&[0; 60_000]) {}
    while rig.engine.transmit.frame(&[0; 600]) {}
    assert!(!rig.engine.finish_service(rig.now, at));
    for _ in 0..5 {
        rig.now = rig.engine.poll_timeout().unwrap().max(rig.now);
        rig.engine.handle_timeout(rig.now);
        let mut dirty = Vec::new();
        rig.engine.take_dirty(&mut dirty);
        for at in dirty {
            rig.engine.finish_service(rig.now, at);
        }
    }
    rig.engine.transmit.clear();
    assert!(rig.engine.finish_service(rig.now, at));
    assert_eq!(rig.only_segment().3, b"hello");
}

#[test]
fn bytes_that_came_before_their_turn_outlive_a_long_silence() {
    let peer = (SERVER, 80);
    let mut rig = Rig::new();
    let (at, acknowledgement) = rig.connect(peer);
    let mut sequence = 1001;
    let take = |rig: &mut Rig| {
        let mut got = Vec::new();
        while rig.engine.connection(at).unwrap().has_received() {
            rig.engine
                .connection(at)
                .unwrap()
                .lend_received(|bytes| {
                    got.extend_from_slice(bytes);
                    Ok::<_, std::convert::Infallible>(bytes.len())
                })
                .unwrap();
        }
        rig.service();
        got
    };
    // Enough that a quiet connection's ring would be given back.
    for _ in 0..512 {
        rig.tcp(peer, 0x10, sequence, acknowledgement, &[1; 1024]);
        sequence += 1024;
        assert_eq!(take(&mut rig).len(), 1024);
    }
    rig.tcp(peer, 0x10, sequence + 1024, acknowledgement, &[3; 1024]);
    rig.service();
    rig.wait(Duration::from_secs(30));
    rig.tcp(peer, 0x10, sequence, acknowledgement, &[2; 1024]);
    let got = take(&mut rig);
    assert_eq!(got, [vec![2; 1024], vec![3; 1024]].concat());
}
