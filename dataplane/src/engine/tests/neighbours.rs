//! Flows between guests that are not both open, sentence by sentence.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use smoltcp::wire::{Icmpv4Packet, Ipv4Packet, UdpPacket};
use vnet_proto::model::{CommandId, Subject, VerdictAction, VmId};

use super::kit::{EPOCH, GATEWAY, GATEWAY_MAC, HOLD, ipv4, verdict};
use super::town::*;
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;
use crate::engine::switch::flow::{LINGER, OPENING_IDLE, TARGETED_BY_ONE_MAX};
use crate::engine::tcp::TCP_IDLE;
use crate::engine::{UDP_IDLE, UDP_UNANSWERED_IDLE};
use crate::mac::Mac;
use crate::message::{FlowEnd, Order, Report};

const ALLOW: VerdictAction = VerdictAction::Allow;
const DENY: VerdictAction = VerdictAction::Deny;

fn code(packet: &[u8]) -> (u8, u8) {
    let ip = Ipv4Packet::new_checked(packet).unwrap();
    assert!(ip.verify_checksum());
    assert!(Icmpv4Packet::new_checked(ip.payload()).unwrap().verify_checksum());
    (ip.payload()[0], ip.payload()[1])
}

fn arp(operation: u8, sender: usize, sender_address: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
    packet.extend_from_slice(&mac(sender).0);
    packet.extend_from_slice(&sender_address.octets());
    packet.extend_from_slice(&[0; 6]);
    packet.extend_from_slice(&target.octets());
    packet
}

fn dhcp_message() -> Vec<u8> {
    let udp = [&68u16.to_be_bytes()[..], &67u16.to_be_bytes(), &[0, 9, 0, 0, 1]].concat();
    ipv4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, 17, &udp)
}

// Opening.

#[test]
fn a_flow_to_another_guest_asks_under_the_guests_guard_and_says_whose_address_it_is() {
    let mut town = Town::new();
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
    let misses = town.misses(ANN);
    assert_eq!(misses.len(), 1);
    assert!(has_guest_guard(&misses[0]));
    let Subject::Flow(flow) = &misses[0].subject else {
        panic!()
    };
    assert_eq!((flow.peer_vm, flow.dialled), (Some(vm(BOB)), address(BOB).into()));
    assert!(
        town.packets(BOB).is_empty() && town.packets(ANN).is_empty(),
        "held"
    );
    assert!(town.reports(BOB).is_empty(), "the other guest is not asked");
}

#[test]
fn after_the_yes_the_held_packet_is_delivered_as_it_was_sent() {
    let mut town = Town::new();
    let syn = segment((ANN, 40_000), (BOB, 80), SYN, (1000, 0), b"in a syn");
    town.ip(ANN, &syn);
    town.answer_only(ANN, ALLOW);
    let frames = town.frames(BOB);
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0][6..14], [&mac(ANN).0[..], &[8, 0]].concat());
    assert_eq!(frames[0][14..], syn);
    let opened = opened(&town.reports(ANN));
    assert_eq!(opened[0].subject.peer_vm, Some(vm(BOB)));
    assert!(opened[0].miss.is_some() && !opened[0].ingress);
    assert!(town.reports(BOB).is_empty(), "one flow is reported once");
}

#[test]
fn an_allowed_connection_is_passed_through_in_both_directions_and_counted() {
    let mut town = Town::new();
    let flow = town.connect().flow;
    let up = segment((ANN, 40_000), (BOB, 80), 0x18, (1001, 5001), b"question");
    let down = segment((BOB, 80), (ANN, 40_000), 0x18, (5001, 1009), b"the answer");
    for _ in 0..2 {
        town.ip(ANN, &up);
        assert_eq!(town.packets(BOB), std::slice::from_ref(&up));
        town.ip(BOB, &down);
        assert_eq!(town.packets(ANN), std::slice::from_ref(&down));
    }
    town.wait(Duration::from_secs(1));
    let counts: Vec<_> = town
        .reports(ANN)
        .into_iter()
        .filter_map(|r| {
            if let Report::FlowStats(c) = r {
                Some(c)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(counts, [vec![(flow, 16, 20)]]);
    assert!(
        !town
            .reports(BOB)
            .iter()
            .any(|r| matches!(r, Report::FlowStats(_)))
    );
}

#[test]
fn a_verdict_in_the_cache_lets_the_next_connection_pass_at_once() {
    let mut town = Town::new();
    town.connect();
    town.tcp((ANN, 40_001), (BOB, 80), SYN, (7000, 0));
    assert_eq!(town.only_segment(BOB), (SYN, 7000, 0));
    let reports = town.reports(ANN);
    assert_eq!(opened(&reports)[0].miss, None);
    assert!(!reports.iter().any(|r| matches!(r, Report::Miss(_))));
}

#[test]
fn packets_of_a_flow_that_ended_before_they_were_passed_on_go_to_no_flow_after_it() {
    use crate::engine::Event;
    let mut town = Town::new();
    town.ip(ANN, &datagram((ANN, 500), (BOB, 53), b"x"));
    let miss = town.misses(ANN).remove(0);
    let now = town.now;
    let engine = town.engine(ANN);
    // Three inputs of one turn, before its events are acted on.
    engine.handle_order(now, Order::Verdict(Box::new(verdict(&miss, ALLOW))));
    engine.handle_guest_gone(now, vm(BOB));
    let packet = datagram((ANN, 501), (CAT, 53), b"y");
    let frame = [&GATEWAY_MAC.0[..], &mac(ANN).0, &[8, 0], &packet].concat();
    engine.handle_frame(now, &frame);
    let mut passed = 0;
    while let Some(event) = engine.poll_event() {
        if let Event::Pass { flow, packets } = event {
            passed += packets.len();
            assert!(engine.flow(flow).is_none(), "its place is another's");
        }
    }
    assert_eq!(passed, 1);
    assert_eq!(engine.flow_count(), 1, "the second waits for its verdict");
}

#[test]
fn a_denied_flow_is_answered_like_any_other() {
    let mut town = Town::new();
    for _ in 0..2 {
        town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
        for miss in town.misses(ANN) {
            town.answer(ANN, &miss, DENY);
        }
        assert_eq!(town.only_segment(ANN), (RST_ACK, 0, 1001));
        town.ip(ANN, &datagram((ANN, 500), (BOB, 53), b"x"));
        for miss in town.misses(ANN) {
            town.answer(ANN, &miss, DENY);
        }
        assert_eq!(code(&town.packets(ANN)[0]), (3, 13));
        town.ip(ANN, &echo(ANN, BOB, 8, 7));
        for miss in town.misses(ANN) {
            town.answer(ANN, &miss, DENY);
        }
        assert_eq!(code(&town.packets(ANN)[0]), (3, 13));
    }
    town.tcp((ANN, 40_000), (BOB, 81), SYN, (1000, 0));
    town.answer_only(ANN, VerdictAction::Drop);
    assert!(town.packets(ANN).is_empty(), "in silence");
    assert!(town.packets(BOB).is_empty());
    assert_eq!(town.engine(ANN).flow_count() + town.engine(BOB).flow_count(), 0);
}

#[test]
fn unanswered_it_is_refused_after_the_hold() {
    let mut town = Town::new();
    town.ip(ANN, &datagram((ANN, 500), (BOB, 53), b"x"));
    town.wait(HOLD);
    assert_eq!(code(&town.packets(ANN)[0]), (3, 13));
    assert!(town.packets(BOB).is_empty());
}

#[test]
fn the_first_datagrams_are_delivered_in_order_and_answers_come_back() {
    let mut town = Town::new();
    let (ann, bob) = ((ANN, 500), (BOB, 53));
    for n in 0..3u8 {
        town.ip(ANN, &datagram(ann, bob, &[n]));
    }
    town.answer_only(ANN, ALLOW);
    assert_eq!(town.packets(BOB), [0, 1, 2u8].map(|n| datagram(ann, bob, &[n])));
    town.ip(BOB, &datagram(bob, ann, b"answer"));
    assert_eq!(town.packets(ANN), [datagram(bob, ann, b"answer")]);
    town.ip(ANN, &datagram(ann, bob, b"more"));
    assert_eq!(town.packets(BOB), [datagram(ann, bob, b"more")]);
    assert!(town.misses(BOB).is_empty());
}

#[test]
fn a_frame_to_the_gateways_mac_reaches_the_guest_as_well() {
    let mut town = Town::new();
    let packet = datagram((ANN, 500), (BOB, 53), b"x");
    town.frame(ANN, GATEWAY_MAC, 0x0800, &packet);
    town.answer_only(ANN, ALLOW);
    assert_eq!(town.packets(BOB), [packet]);
}

#[test]
fn the_address_says_whom_a_frame_is_for_and_not_its_mac() {
    let mut town = Town::new();
    let packet = datagram((ANN, 500), (BOB, 53), b"x");
    town.frame(ANN, mac(CAT), 0x0800, &packet);
    town.answer_only(ANN, ALLOW);
    assert_eq!(town.packets(BOB), [packet]);
    assert!(town.packets(CAT).is_empty());
    // Another guest is no router, and nothing is passed on to all.
    let out = ipv4(
        address(ANN),
        Ipv4Addr::new(203, 0, 113, 9),
        17,
        &[0, 1, 0, 2, 0, 9, 0, 0, 1],
    );
    town.frame(ANN, mac(BOB), 0x0800, &out);
    town.frame(
        ANN,
        mac(BOB),
        0x0800,
        &ipv4(address(ANN), GATEWAY, 1, &[8, 0, 0, 0, 0, 1, 0, 1]),
    );
    let to_all = ipv4(
        address(ANN),
        Ipv4Addr::new(192, 168, 127, 255),
        17,
        &[0, 1, 0, 2, 0, 9, 0, 0, 1],
    );
    town.frame(ANN, Mac::BROADCAST, 0x0800, &to_all);
    town.frame(ANN, Mac([1, 0, 0x5e, 0, 0, 251]), 0x0800, &to_all);
    assert_eq!(town.engine(ANN).dropped(DropReason::GuestToGuest), 4);
    town.ip(ANN, &datagram((ANN, 1), (ANN, 2), b"x"));
    assert_eq!(
        town.engine(ANN).dropped(DropReason::Destination),
        1,
        "its own address"
    );
    assert!(town.misses(ANN).is_empty() && town.packets(BOB).is_empty());
}

// What passes back.

#[test]
fn of_the_other_guest_only_answers_pass_and_all_else_is_its_own_flow() {
    let mut town = Town::new();
    town.connect();
    town.tcp((BOB, 81), (ANN, 40_000), SYN, (1, 0));
    town.tcp((BOB, 80), (ANN, 40_001), SYN, (1, 0));
    town.tcp((BOB, 80), (ANN, 22), SYN, (1, 0));
    let asked: Vec<String> = town
        .misses(BOB)
        .iter()
        .map(|m| {
            let Subject::Flow(flow) = &m.subject else { panic!() };
            assert!(has_guest_guard(m) && flow.peer_vm == Some(vm(ANN)));
            flow.key.to_string()
        })
        .collect();
    assert_eq!(
        asked,
        [
            "tcp 192.168.127.2:40000",
            "tcp 192.168.127.2:40001",
            "tcp 192.168.127.2:22"
        ]
    );
    // Segments of no flow are reset where they come from.
    town.tcp((BOB, 80), (ANN, 40_002), ACK, (1, 77));
    assert_eq!(town.only_segment(BOB), (RST, 77, 0));
    // A SYN is no answer, not even between the same two ends.
    town.tcp((BOB, 80), (ANN, 40_000), SYN, (1, 0));
    assert_eq!(town.engine(BOB).dropped(DropReason::GuestToGuest), 1);
    assert!(town.misses(BOB).is_empty() && town.packets(ANN).is_empty());
    // Datagrams to another port than the one that asked are the other's own.
    town.associate((ANN, 500), (BOB, 53));
    town.ip(BOB, &datagram((BOB, 53), (ANN, 501), b"x"));
    town.ip(BOB, &datagram((BOB, 54), (ANN, 500), b"x"));
    assert_eq!(town.misses(BOB).len(), 2);
    assert!(town.packets(ANN).is_empty());
    // And a third guest has no part in it.
    town.ip(CAT, &datagram((CAT, 53), (ANN, 500), b"x"));
    town.ip(CAT, &datagram((CAT, 500), (BOB, 53), b"x"));
    assert_eq!(town.misses(CAT).len(), 2);
    assert!(town.packets(ANN).is_empty() && town.packets(BOB).is_empty());
}

#[test]
fn an_echo_request_is_answered_and_nothing_else_of_icmp_passes() {
    let mut town = Town::new();
    town.ip(ANN, &echo(ANN, BOB, 8, 77));
    town.answer_only(ANN, ALLOW);
    assert_eq!(town.packets(BOB), [echo(ANN, BOB, 8, 77)]);
    town.ip(BOB, &echo(BOB, ANN, 0, 77));
    assert_eq!(town.packets(ANN), [echo(BOB, ANN, 0, 77)]);
    town.ip(BOB, &echo(BOB, ANN, 0, 78));
    town.ip(ANN, &echo(ANN, BOB, 0, 77));
    town.ip(CAT, &echo(CAT, ANN, 0, 77));
    for who in [ANN, BOB, CAT] {
        assert_eq!(town.engine(who).dropped(DropReason::GuestToGuest), 1, "{who}");
    }
    // The other's own question, though its identifier is the same.
    town.ip(BOB, &echo(BOB, ANN, 8, 77));
    town.answer_only(BOB, ALLOW);
    assert_eq!(town.packets(ANN), [echo(BOB, ANN, 8, 77)]);
    town.ip(ANN, &echo(ANN, BOB, 0, 77));
    assert_eq!(town.packets(BOB), [echo(ANN, BOB, 0, 77)]);
    for kind in [4, 5, 9, 13, 17] {
        town.ip(BOB, &echo(BOB, ANN, kind, 77));
    }
    assert_eq!(town.engine(BOB).dropped(DropReason::IpProtocol), 5);
    town.ip(BOB, &ipv4(address(BOB), address(ANN), 47, &[0; 8]));
    assert_eq!(town.engine(BOB).dropped(DropReason::IpProtocol), 6);
    assert!(town.packets(ANN).is_empty());
}

#[test]
fn an_identifier_of_zero_keeps_question_and_answer_apart() {
    let mut town = Town::new();
    town.ip(ANN, &echo(ANN, BOB, 8, 0));
    town.answer_only(ANN, ALLOW);
    town.packets(BOB);
    town.ip(BOB, &echo(BOB, ANN, 8, 0));
    assert_eq!(town.engine(BOB).dropped(DropReason::GuestToGuest), 1);
    town.ip(BOB, &echo(BOB, ANN, 0, 0));
    assert_eq!(town.packets(ANN), [echo(BOB, ANN, 0, 0)]);
}

#[test]
fn errors_about_an_opened_flow_pass_and_others_do_not() {
    let mut town = Town::new();
    let (ann, bob) = ((ANN, 500), (BOB, 53));
    town.associate(ann, bob);
    let asked = datagram(ann, bob, b"first");
    let about = error_about(&asked, BOB, ANN);
    town.ip(BOB, &about);
    assert_eq!(town.packets(ANN), [about]);
    // From the opener, about an answer.
    let answered = datagram(bob, ann, b"answer");
    town.ip(BOB, &answered);
    town.packets(ANN);
    let about = error_about(&answered, ANN, BOB);
    town.ip(ANN, &about);
    assert_eq!(town.packets(BOB), [about]);
    // About another port, about a packet that went the other way, and from a third guest.
    for (who, error) in [
        (BOB, error_about(&datagram(ann, (BOB, 54), b"x"), BOB, ANN)),
        (BOB, error_about(&answered, BOB, ANN)),
        (CAT, error_about(&asked, CAT, ANN)),
    ] {
        town.ip(who, &error);
    }
    let dropped = |town: &mut Town, who| {
        town.engine(who).dropped(DropReason::GuestToGuest) + town.engine(who).dropped(DropReason::IpProtocol)
    };
    assert_eq!((dropped(&mut town, BOB), dropped(&mut town, CAT)), (2, 1));
    assert!(town.packets(ANN).is_empty());
    // About a connection, and about an echo.
    town.connect();
    let error = error_about(
        &segment((ANN, 40_000), (BOB, 80), ACK, (1001, 5001), b""),
        BOB,
        ANN,
    );
    town.ip(BOB, &error);
    assert_eq!(town.packets(ANN), [error]);
    town.ip(ANN, &echo(ANN, BOB, 8, 7));
    town.answer_only(ANN, ALLOW);
    let error = error_about(&echo(ANN, BOB, 8, 7), BOB, ANN);
    town.ip(BOB, &error);
    assert_eq!(town.packets(ANN), [error]);
}

#[test]
fn dhcp_answers_never_pass_whatever_is_allowed() {
    let mut town = Town::new();
    town.ip(ANN, &datagram((ANN, 68), (BOB, 67), b"x"));
    town.answer_only(ANN, ALLOW);
    assert_eq!(town.packets(BOB).len(), 1);
    town.ip(BOB, &datagram((BOB, 67), (ANN, 68), b"offer"));
    town.frame(
        BOB,
        GATEWAY_MAC,
        0x0800,
        &datagram((BOB, 67), (ANN, 68), b"offer"),
    );
    assert_eq!(town.engine(BOB).dropped(DropReason::RogueDhcp), 2);
    assert!(town.packets(ANN).is_empty() && town.misses(BOB).is_empty());
}

// Fragments.

#[test]
fn fragments_are_judged_whole_and_arrive_in_fragments() {
    let mut town = Town::new();
    let (ann, bob) = ((ANN, 500), (BOB, 53));
    let fragments = |from, to, payload: &[u8]| {
        let whole = datagram(from, to, payload);
        let part = |range: std::ops::Range<usize>, more: bool| {
            let mut packet = whole[..20].to_vec();
            packet.extend_from_slice(&whole[20..][range.clone()]);
            let length = packet.len() as u16;
            packet[2..4].copy_from_slice(&length.to_be_bytes());
            packet[4..6].copy_from_slice(&[7, 7]);
            let flags = (range.start / 8) as u16 | if more { 0x2000 } else { 0 };
            packet[6..8].copy_from_slice(&flags.to_be_bytes());
            packet
        };
        let bytes = whole.len() - 20;
        [part(0..1480, true), part(1480..bytes, false)]
    };
    let collect = |packets: Vec<Vec<u8>>| {
        let mut payload = vec![0; 8 + 2000];
        for packet in &packets {
            assert!(packet.len() <= 1500);
            assert!(Ipv4Packet::new_checked(packet).unwrap().verify_checksum());
            let ip = Ip::parse(packet).unwrap();
            payload[usize::from(ip.part.unwrap().offset)..][..ip.payload().len()]
                .copy_from_slice(ip.payload());
        }
        assert_eq!(packets.len(), 2);
        let udp = UdpPacket::new_checked(&payload).unwrap();
        (udp.src_port(), udp.payload().to_vec())
    };

    let [first, second] = fragments(ann, bob, &[7; 2000]);
    town.ip(ANN, &second);
    assert!(town.misses(ANN).is_empty(), "a later fragment alone asks nothing");
    assert!(town.packets(BOB).is_empty(), "and passes nowhere");
    town.ip(ANN, &first);
    town.answer_only(ANN, ALLOW);
    assert_eq!(collect(town.packets(BOB)), (500, vec![7; 2000]));
    for fragment in fragments(ann, bob, &[8; 2000]) {
        town.ip(ANN, &fragment);
    }
    assert_eq!(collect(town.packets(BOB)), (500, vec![8; 2000]));
    for fragment in fragments(bob, ann, &[9; 2000]) {
        town.ip(BOB, &fragment);
    }
    assert_eq!(collect(town.packets(ANN)), (53, vec![9; 2000]));

    let [_, second] = fragments(ann, bob, &[7; 2000]);
    town.ip(ANN, &second);
    assert!(town.packets(BOB).is_empty(), "not even in an opened flow");
    let mut tcp = segment((ANN, 40_000), (BOB, 80), ACK, (1, 1), &[0; 64]);
    tcp[6..8].copy_from_slice(&0x2000u16.to_be_bytes());
    town.ip(ANN, &tcp);
    assert_eq!(
        town.engine(ANN).dropped(DropReason::Fragment),
        1,
        "nobody fragments TCP"
    );
}

// Ends.

#[test]
fn a_cut_resets_both_guests_and_the_verdict_stays() {
    let mut town = Town::new();
    let flow = town.connect().flow;
    town.ip(
        ANN,
        &segment((ANN, 40_000), (BOB, 80), 0x18, (1001, 5001), b"12345"),
    );
    town.packets(BOB);
    town.order(
        ANN,
        Order::Cut {
            command: CommandId(5),
            flows: vec![flow],
        },
    );
    assert_eq!(town.only_segment(ANN), (RST_ACK, 5001, 1006));
    assert_eq!(town.only_segment(BOB), (RST_ACK, 1006, 5001));
    let reports = town.reports(ANN);
    assert_eq!(closed(&reports), [(flow, FlowEnd::Cut, 5, 0)]);
    assert!(reports.iter().any(|r| matches!(r, Report::Done { cut: 1, .. })));
    // What either still sends is reset, and reaches nobody.
    town.tcp((BOB, 80), (ANN, 40_000), ACK, (5001, 1006));
    assert_eq!(town.only_segment(BOB), (RST, 1006, 0));
    town.tcp((ANN, 40_000), (BOB, 80), ACK, (1006, 5001));
    assert_eq!(town.only_segment(ANN), (RST, 5001, 0));
    assert_eq!(town.engine(ANN).flow_count() + town.engine(BOB).flow_count(), 0);
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (9000, 0));
    assert_eq!(town.only_segment(BOB), (SYN, 9000, 0));
}

#[test]
fn nothing_passes_from_the_moment_of_a_cut_though_the_other_end_has_not_heard() {
    let mut town = Town::new();
    let flow = town.connect().flow;
    let udp = town.associate((ANN, 500), (BOB, 53)).flow;
    town.packets(ANN);
    // On its way to Bob when the cut comes.
    let late = segment((ANN, 40_000), (BOB, 80), 0x18, (1001, 5001), b"late");
    town.frame_unsettled(ANN, mac(BOB), 0x0800, &late);
    let now = town.now;
    let order = Order::Cut {
        command: CommandId(1),
        flows: vec![flow, udp],
    };
    town.engine(ANN).handle_order(now, order);
    town.packets(ANN);
    town.turn(BOB);
    assert!(town.packets(BOB).is_empty(), "its permit is closed");
    let answer = segment((BOB, 80), (ANN, 40_000), ACK, (5001, 1001), b"answer");
    town.frame_unsettled(BOB, mac(ANN), 0x0800, &answer);
    assert_eq!(town.only_segment(BOB), (RST, 1001, 0));
    town.frame_unsettled(BOB, mac(ANN), 0x0800, &datagram((BOB, 53), (ANN, 500), b"x"));
    town.settle();
    assert_eq!(town.misses(BOB).len(), 1, "its own flow from now on");
    assert!(town.packets(ANN).is_empty());
}

#[test]
fn a_revocation_takes_the_permission_away() {
    let mut town = Town::new();
    let flow = town.connect().flow;
    town.order(
        ANN,
        Order::Revoke {
            command: None,
            epoch: EPOCH.next(),
        },
    );
    town.order(
        ANN,
        Order::Cut {
            command: CommandId(1),
            flows: vec![flow],
        },
    );
    town.packets(ANN);
    town.packets(BOB);
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (9000, 0));
    assert_eq!(town.misses(ANN).len(), 1);
    assert!(town.packets(BOB).is_empty());
}

#[test]
fn a_grants_end_ends_the_flow_at_both_guests() {
    let mut town = Town::new();
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
    let miss = town.misses(ANN).remove(0);
    let mut timed = verdict(&miss, ALLOW);
    timed.expires_in = Some(Duration::from_secs(5));
    town.order(ANN, Order::Verdict(Box::new(timed)));
    town.packets(BOB);
    town.wait(Duration::from_secs(5));
    assert_eq!(town.only_segment(ANN).0, RST_ACK);
    assert_eq!(town.only_segment(BOB).0, RST);
    assert_eq!(closed(&town.reports(ANN))[0].1, FlowEnd::GrantEnded);
}

#[test]
fn a_grant_for_once_opens_one_connection() {
    let mut town = Town::new();
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
    town.tcp((ANN, 40_001), (BOB, 80), SYN, (2000, 0));
    let misses = town.misses(ANN);
    let mut once = verdict(&misses[0], ALLOW);
    once.once = true;
    town.order(ANN, Order::Verdict(Box::new(once)));
    assert_eq!(town.only_segment(BOB), (SYN, 1000, 0));
    assert_eq!(town.misses(ANN).len(), 1, "the second asks anew");
}

#[test]
fn a_connection_closed_in_order_is_over_soon_and_its_last_words_pass() {
    let mut town = Town::new();
    let flow = town.connect().flow;
    let (ann, bob) = ((ANN, 40_000), (BOB, 80));
    town.tcp(ann, bob, FIN_ACK, (1001, 5001));
    town.tcp(bob, ann, ACK, (5001, 1002));
    town.wait(TCP_IDLE - Duration::from_secs(1));
    assert!(closed(&town.reports(ANN)).is_empty(), "half closed is not closed");
    town.tcp(bob, ann, FIN_ACK, (5001, 1002));
    town.tcp(ann, bob, ACK, (1002, 5002));
    town.wait(LINGER / 2);
    town.packets(ANN);
    town.packets(BOB);
    town.tcp(bob, ann, FIN_ACK, (5001, 1002));
    assert_eq!(
        town.only_segment(ANN).0,
        FIN_ACK,
        "repeated, because the last word was lost"
    );
    town.tcp(ann, bob, ACK, (1002, 5002));
    assert_eq!(town.only_segment(BOB).0, ACK);
    assert!(closed(&town.reports(ANN)).is_empty());
    town.wait(LINGER / 2);
    assert_eq!(closed(&town.reports(ANN)), [(flow, FlowEnd::Finished, 0, 0)]);
    assert_eq!(town.engine(ANN).flow_count() + town.engine(BOB).flow_count(), 0);
    assert!(
        town.packets(ANN).is_empty() && town.packets(BOB).is_empty(),
        "no RST"
    );
}

#[test]
fn a_reset_of_either_passes_and_ends_the_flow() {
    for (who, end) in [(ANN, FlowEnd::GuestReset), (BOB, FlowEnd::HostReset)] {
        let mut town = Town::new();
        let flow = town.connect().flow;
        let (from, to) = if who == ANN {
            ((ANN, 40_000), (BOB, 80))
        } else {
            ((BOB, 80), (ANN, 40_000))
        };
        town.tcp(from, to, RST, (1001, 0));
        assert_eq!(town.only_segment(to.0).0, RST);
        town.wait(LINGER);
        assert_eq!(closed(&town.reports(ANN)), [(flow, end, 0, 0)]);
        assert_eq!(town.engine(ANN).flow_count() + town.engine(BOB).flow_count(), 0);
        assert!(town.packets(ANN).is_empty() && town.packets(BOB).is_empty());
    }
}

#[test]
fn a_refused_port_is_refused_by_the_guest_itself() {
    let mut town = Town::new();
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
    town.answer_only(ANN, ALLOW);
    town.packets(BOB);
    town.tcp((BOB, 80), (ANN, 40_000), RST_ACK, (0, 1001));
    assert_eq!(town.only_segment(ANN), (RST_ACK, 0, 1001));
    // The guest tries again before the end of the first attempt is reported.
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
    assert_eq!(town.only_segment(BOB), (SYN, 1000, 0));
    town.tcp((BOB, 80), (ANN, 40_000), SYN_ACK, (5000, 1001));
    assert_eq!(town.only_segment(ANN).0, SYN_ACK);
}

#[test]
fn a_guest_started_anew_opens_a_new_connection_between_the_same_ends() {
    let mut town = Town::new();
    let old = town.connect().flow;
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
    assert_eq!(
        town.only_segment(BOB),
        (SYN, 1000, 0),
        "the same SYN again is a repetition"
    );
    assert!(closed(&town.reports(ANN)).is_empty());
    // The SYN is in Bob's inbox before the word that the old connection is over.
    let anew = segment((ANN, 40_000), (BOB, 80), SYN, (77_000, 0), b"");
    town.frame_unsettled(ANN, mac(BOB), 0x0800, &anew);
    town.turn(BOB);
    let sent = town.packets(BOB);
    assert_eq!(sent.len(), 2);
    assert_eq!(sent[0][33] & 0x3f, RST_ACK, "the old one is reset first");
    assert_eq!(sent[1], anew);
    town.settle();
    let reports = town.reports(ANN);
    assert_eq!(closed(&reports)[0], (old, FlowEnd::GuestReset, 0, 0));
    assert_eq!(opened(&reports).len(), 1);
    town.tcp((BOB, 80), (ANN, 40_000), SYN_ACK, (6000, 77_001));
    assert_eq!(town.only_segment(ANN), (SYN_ACK, 6000, 77_001));
}

#[test]
fn idle_flows_end_by_the_openers_clock_at_both_guests() {
    let mut town = Town::new();
    town.tcp((ANN, 40_000), (BOB, 81), SYN, (1000, 0));
    town.answer_only(ANN, ALLOW);
    town.packets(BOB);
    town.reports(ANN);
    town.wait(OPENING_IDLE - Duration::from_secs(1));
    assert!(town.packets(ANN).is_empty());
    town.wait(Duration::from_secs(1));
    assert_eq!(town.only_segment(ANN).0, RST_ACK, "half open");
    assert_eq!(town.only_segment(BOB).0, RST);
    town.connect();
    town.associate((ANN, 500), (BOB, 53));
    town.ip(ANN, &echo(ANN, BOB, 8, 7));
    town.answer_only(ANN, ALLOW);
    town.wait(UDP_UNANSWERED_IDLE);
    assert_eq!(closed(&town.reports(ANN)).len(), 1, "unanswered datagrams");
    town.ip(ANN, &datagram((ANN, 500), (BOB, 53), b"x"));
    town.ip(BOB, &datagram((BOB, 53), (ANN, 500), b"y"));
    town.wait(UDP_IDLE - Duration::from_secs(1));
    let ended = closed(&town.reports(ANN));
    assert_eq!(ended.len(), 1, "the echo session: {ended:?}");
    town.wait(Duration::from_secs(1));
    assert_eq!(closed(&town.reports(ANN))[0].1, FlowEnd::Idle);
    town.packets(ANN);
    town.packets(BOB);
    town.wait(TCP_IDLE);
    assert_eq!(town.only_segment(ANN).0, RST_ACK);
    assert_eq!(town.only_segment(BOB).0, RST_ACK);
    assert_eq!(town.engine(ANN).flow_count() + town.engine(BOB).flow_count(), 0);
}

// Guests and addresses that go away.

#[test]
fn a_guest_that_goes_away_takes_its_flows_with_it_at_the_other() {
    for (gone, stays, to_ann) in [(BOB, ANN, true), (ANN, BOB, false)] {
        let mut town = Town::new();
        let flow = town.connect().flow;
        town.leave(gone);
        assert_eq!(town.only_segment(stays).0, RST_ACK);
        assert_eq!(town.engine(stays).flow_count(), 0);
        let end = if to_ann {
            FlowEnd::Unreachable
        } else {
            FlowEnd::VmDown
        };
        assert_eq!(closed(&town.reports(ANN)), [(flow, end, 0, 0)]);
        let mut town = Town::new();
        town.connect();
        town.vanish(gone);
        assert_eq!(town.only_segment(stays).0, RST_ACK, "without a word");
        assert_eq!(town.engine(stays).flow_count(), 0);
    }
    // What still waits for an answer.
    let mut town = Town::new();
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (1000, 0));
    let miss = town.misses(ANN).remove(0);
    town.leave(BOB);
    assert_eq!(town.only_segment(ANN).0, RST_ACK);
    town.answer(ANN, &miss, ALLOW);
    assert!(opened(&town.reports(ANN)).is_empty());
}

#[test]
fn an_address_that_is_given_back_ends_the_flows_to_it() {
    let mut town = Town::new();
    let flow = town.connect().flow;
    town.frame(BOB, Mac::BROADCAST, 0x0800, &dhcp_message());
    assert_eq!(town.only_segment(ANN).0, RST_ACK);
    assert_eq!(closed(&town.reports(ANN)), [(flow, FlowEnd::Unreachable, 0, 0)]);
    town.packets(ANN);
    town.tcp((ANN, 40_000), (BOB, 80), SYN, (9000, 0));
    assert_eq!(code(&town.packets(ANN)[0]), (3, 1), "nobody has it");
}

#[test]
fn a_verdict_on_one_guest_opens_nothing_to_the_next_owner_of_its_address() {
    let mut town = Town::new();
    town.associate((ANN, 500), (BOB, 53));
    let waiting = datagram((ANN, 500), (BOB, 54), b"x");
    town.ip(ANN, &waiting);
    let to_bob = town.misses(ANN).remove(0);
    town.street
        .owners
        .lock()
        .unwrap()
        .insert(address(BOB).into(), CAT);
    // What waits for Bob's answer, and what is asked of Cat, are two questions.
    town.ip(ANN, &datagram((ANN, 501), (BOB, 54), b"x"));
    let to_cat = town.misses(ANN).remove(0);
    assert_ne!(to_bob.id, to_cat.id);
    town.answer(ANN, &to_bob, ALLOW);
    assert_eq!(code(&town.packets(ANN)[0]), (3, 1));
    assert!(town.packets(BOB).is_empty() && town.packets(CAT).is_empty());
    assert!(opened(&town.reports(ANN)).is_empty());
    // Nor does the verdict in the cache.
    town.ip(ANN, &datagram((ANN, 502), (BOB, 53), b"x"));
    let misses = town.misses(ANN);
    assert_eq!(misses.len(), 1);
    let Subject::Flow(flow) = &misses[0].subject else {
        panic!()
    };
    assert_eq!(flow.peer_vm, Some(vm(CAT)));
}

// Limits and collisions.

#[test]
fn one_guest_cannot_fill_another_nor_shut_out_a_third() {
    let mut town = Town::with_flows(4 * TARGETED_BY_ONE_MAX);
    let count = TARGETED_BY_ONE_MAX as u16;
    town.connect();
    for port in 1..count {
        town.tcp((ANN, port), (BOB, 80), SYN, (1000, 0));
    }
    assert_eq!(town.packets(BOB).len(), TARGETED_BY_ONE_MAX - 1);
    town.reports(ANN);
    town.tcp((ANN, count), (BOB, 80), SYN, (1000, 0));
    assert!(town.packets(BOB).is_empty());
    assert_eq!(town.only_segment(ANN), (RST_ACK, 0, 1001), "refused at once");
    assert_eq!(closed(&town.reports(ANN))[0].1, FlowEnd::Evicted);
    assert_eq!(town.engine(BOB).dropped(DropReason::FlowLimit), 1);
    assert_eq!(town.engine(BOB).flow_count(), TARGETED_BY_ONE_MAX);
    town.associate((CAT, 500), (BOB, 53));
    // One that ends makes room.
    town.tcp((ANN, 40_000), (BOB, 80), RST, (1001, 0));
    town.packets(BOB);
    town.wait(LINGER);
    town.tcp((ANN, count), (BOB, 80), SYN, (1000, 0));
    assert_eq!(town.only_segment(BOB), (SYN, 1000, 0));
}

#[test]
fn a_full_table_refuses_other_guests() {
    let mut town = Town::with_flows(2);
    town.associate((BOB, 1), (CAT, 1));
    town.associate((BOB, 2), (CAT, 2));
    town.ip(ANN, &datagram((ANN, 500), (BOB, 53), b"x"));
    town.answer_only(ANN, ALLOW);
    assert_eq!(closed(&town.reports(ANN))[0].1, FlowEnd::Evicted);
    assert_eq!(town.engine(BOB).dropped(DropReason::FlowLimit), 1);
    assert!(town.packets(BOB).is_empty());
    // And its own.
    town.tcp((BOB, 3), (ANN, 3), SYN, (1, 0));
    assert_eq!(town.only_segment(BOB), (RST_ACK, 0, 2));
    assert_eq!(town.engine(BOB).dropped(DropReason::FlowLimit), 2);
}

#[test]
fn a_full_inbox_loses_a_packet_and_the_next_one_introduces_the_flow() {
    let mut town = Town::new();
    town.inbox_max = 0;
    town.ip(ANN, &datagram((ANN, 500), (BOB, 53), b"lost"));
    town.answer_only(ANN, ALLOW);
    assert_eq!(town.engine(ANN).dropped(DropReason::PeerQueueFull), 1);
    town.inbox_max = 2;
    for payload in [b"one", b"two", b"3rd"] {
        town.frame_unsettled(ANN, mac(BOB), 0x0800, &datagram((ANN, 500), (BOB, 53), payload));
    }
    assert_eq!(town.engine(ANN).dropped(DropReason::PeerQueueFull), 2);
    town.settle();
    assert_eq!(town.packets(BOB).len(), 2);
    town.ip(BOB, &datagram((BOB, 53), (ANN, 500), b"answer"));
    assert_eq!(town.packets(ANN).len(), 1);
}

#[test]
fn two_flows_between_the_same_ends_opened_from_both_sides_do_not_mix() {
    let mut town = Town::new();
    let (ann, bob) = ((ANN, 500), (BOB, 500));
    town.ip(ANN, &datagram(ann, bob, b"from ann"));
    town.ip(BOB, &datagram(bob, ann, b"from bob"));
    let (to_bob, to_ann) = (town.misses(ANN).remove(0), town.misses(BOB).remove(0));
    // Bob has a flow of his own there that still waits: Ann's is refused.
    town.answer(ANN, &to_bob, ALLOW);
    let reports = town.reports(ANN);
    assert_eq!(closed(&reports)[0].1, FlowEnd::Unreachable);
    assert_eq!(town.engine(BOB).dropped(DropReason::GuestToGuest), 1);
    assert!(town.packets(BOB).is_empty());
    // His is let through, and hers are answers to it from now on.
    town.answer(BOB, &to_ann, ALLOW);
    assert_eq!(town.packets(ANN), [datagram(bob, ann, b"from bob")]);
    town.ip(ANN, &datagram(ann, bob, b"answer"));
    assert_eq!(town.packets(BOB), [datagram(ann, bob, b"answer")]);
    assert_eq!(
        (town.engine(ANN).flow_count(), town.engine(BOB).flow_count()),
        (1, 1)
    );
}

#[test]
fn the_limits_of_associations_hold_between_guests_too() {
    let mut town = Town::with_flows(1024);
    town.ip(ANN, &echo(ANN, BOB, 8, 0));
    town.answer_only(ANN, ALLOW);
    for identifier in 1..=crate::engine::ECHO_FLOWS_MAX as u16 {
        town.now += Duration::from_millis(1);
        town.ip(ANN, &echo(ANN, BOB, 8, identifier));
    }
    assert_eq!(town.engine(ANN).flow_count(), crate::engine::ECHO_FLOWS_MAX);
    assert_eq!(town.engine(BOB).flow_count(), crate::engine::ECHO_FLOWS_MAX);
    assert_eq!(closed(&town.reports(ANN))[0].1, FlowEnd::Evicted);
}

// Switches that open and close.

#[test]
fn quarantine_cuts_what_others_opened_and_refuses_more() {
    let mut town = Town::new();
    let flow = town.connect().flow;
    town.settings(BOB, false, true);
    assert_eq!(town.only_segment(ANN).0, RST_ACK);
    assert_eq!(town.only_segment(BOB).0, RST_ACK);
    assert_eq!(closed(&town.reports(ANN)), [(flow, FlowEnd::Cut, 0, 0)]);
    town.tcp((ANN, 40_001), (BOB, 80), SYN, (1000, 0));
    assert_eq!(town.only_segment(ANN).0, RST_ACK, "though the cache allows it");
    assert!(town.packets(BOB).is_empty());
}

#[test]
fn two_open_guests_are_switched_and_one_open_guest_is_filtered() {
    let mut town = Town::new();
    town.settings(ANN, true, false);
    let packet = datagram((ANN, 500), (BOB, 53), b"x");
    town.ip(ANN, &packet);
    assert!(town.packets(BOB).is_empty());
    assert_eq!(town.misses(ANN).len(), 1, "Bob is closed");
    town.settings(BOB, true, false);
    town.ip(ANN, &packet);
    // So it is with a guest that sends everything to its router.
    town.frame(ANN, GATEWAY_MAC, 0x0800, &packet);
    for frame in town.frames(BOB) {
        assert_eq!(frame[..6], mac(BOB).0);
        assert_eq!(frame[14..], packet);
    }
    assert!(town.misses(ANN).is_empty());
    let mut offer = datagram((ANN, 67), (BOB, 68), b"x");
    town.ip(ANN, &offer);
    town.settings(ANN, false, false);
    offer[23] = 17;
    town.ip(ANN, &offer);
    assert_eq!(town.engine(ANN).dropped(DropReason::RogueDhcp), 2);
    // Under way when the switch closes.
    town.settings(ANN, true, false);
    town.frame_unsettled(ANN, mac(BOB), 0x0800, &packet);
    let now = town.now;
    let closed = crate::message::Settings {
        name: "guest-1".into(),
        lookup_hold: HOLD,
        ..super::kit::settings()
    };
    town.engine(BOB).handle_order(now, Order::Settings(closed));
    town.settle();
    assert!(town.packets(BOB).is_empty());
    assert_eq!(town.engine(BOB).dropped(DropReason::GuestToGuest), 1);
}

#[test]
fn a_connection_goes_on_when_both_guests_become_open_and_is_not_reset_for_being_idle() {
    let mut town = Town::new();
    town.connect();
    town.settings(ANN, true, false);
    town.settings(BOB, true, false);
    let data = segment((ANN, 40_000), (BOB, 80), 0x18, (1001, 5001), b"plain");
    town.ip(ANN, &data);
    assert_eq!(town.packets(BOB), [data]);
    town.wait(TCP_IDLE);
    assert_eq!(closed(&town.reports(ANN))[0].1, FlowEnd::Idle);
    assert!(town.packets(ANN).is_empty() && town.packets(BOB).is_empty());
}

// ARP.

#[test]
fn the_gateway_tells_the_mac_of_a_guest_that_may_not_be_asked() {
    let mut town = Town::new();
    for sender in [address(ANN), Ipv4Addr::UNSPECIFIED] {
        for to in [Mac::BROADCAST, mac(BOB), GATEWAY_MAC] {
            town.frame(ANN, to, 0x0806, &arp(1, ANN, sender, address(BOB)));
            let frames = town.frames(ANN);
            assert_eq!(frames.len(), 1);
            assert_eq!(frames[0][6..12], mac(BOB).0, "as if Bob had answered");
            assert_eq!(frames[0][20..22], [0, 2]);
            assert_eq!(frames[0][22..28], mac(BOB).0);
            assert_eq!(frames[0][28..32], address(BOB).octets());
        }
    }
    for nobody in [
        address(ANN),
        Ipv4Addr::new(192, 168, 127, 77),
        Ipv4Addr::new(10, 0, 0, 1),
    ] {
        town.frame(ANN, Mac::BROADCAST, 0x0806, &arp(1, ANN, address(ANN), nobody));
        assert!(town.frames(ANN).is_empty(), "{nobody}");
    }
    assert!(
        town.frames(BOB).is_empty() && town.frames(CAT).is_empty(),
        "no ARP passes"
    );
    // Where one of the two is open it is the same; where both are, they ask each other.
    town.settings(ANN, true, false);
    town.frame(
        ANN,
        Mac::BROADCAST,
        0x0806,
        &arp(1, ANN, address(ANN), address(BOB)),
    );
    assert_eq!(town.frames(ANN).len(), 1);
    town.settings(BOB, true, false);
    town.frame(
        ANN,
        Mac::BROADCAST,
        0x0806,
        &arp(1, ANN, address(ANN), address(BOB)),
    );
    assert!(town.frames(ANN).is_empty());
    assert_eq!(town.frames(BOB).len(), 1);
    assert!(town.frames(CAT).is_empty());
}

#[test]
fn arp_answers_and_announcements_pass_to_nobody() {
    let mut town = Town::new();
    town.frame(ANN, mac(BOB), 0x0806, &arp(2, ANN, address(ANN), address(BOB)));
    town.frame(
        ANN,
        Mac::BROADCAST,
        0x0806,
        &arp(2, ANN, address(ANN), address(ANN)),
    );
    town.frame(
        ANN,
        Mac::BROADCAST,
        0x0806,
        &arp(1, ANN, address(ANN), address(ANN)),
    );
    // For what it does not own, not even while the switch is open.
    town.settings(ANN, true, false);
    town.settings(BOB, true, false);
    town.settings(CAT, true, false);
    town.frame(ANN, mac(BOB), 0x0806, &arp(2, ANN, address(CAT), address(BOB)));
    town.frame(ANN, Mac::BROADCAST, 0x0806, &arp(2, ANN, GATEWAY, GATEWAY));
    assert_eq!(town.engine(ANN).dropped(DropReason::SpoofedAddress), 2);
    assert_eq!(town.engine(ANN).dropped(DropReason::GuestToGuest), 1);
    for who in [ANN, BOB, CAT] {
        assert!(town.frames(who).is_empty(), "{who}");
    }
}

// Whatever comes.

#[test]
fn no_frame_between_guests_makes_an_engine_panic_or_grow() {
    let mut town = Town::new();
    town.connect();
    town.associate((BOB, 500), (CAT, 53));
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    };
    for turn in 0..40_000u32 {
        let who = next(3) as usize;
        let to = (who + 1 + next(2) as usize) % 3;
        let ports = [80u16, 53, 500, 40_000, next(65_536) as u16];
        let (from, into) = ((who, ports[next(5) as usize]), (to, ports[next(5) as usize]));
        let numbers = (next(1 << 32) as u32, next(1 << 32) as u32);
        let mut packet = match next(5) {
            0 | 1 => segment(from, into, next(64) as u8, numbers, &[0; 9]),
            2 => datagram(from, into, &[7; 40]),
            3 => echo(who, to, [0, 8][next(2) as usize], next(3) as u16),
            _ => error_about(&datagram(into, from, b"quoted here"), who, to),
        };
        for _ in 0..next(3) {
            let at = 20 + next(packet.len() as u64 - 20) as usize;
            packet[at] = next(256) as u8;
        }
        if next(8) == 0 {
            packet[6..8].copy_from_slice(&(next(1 << 14) as u16).to_be_bytes());
        }
        town.ip(who, &packet);
        for guest in [ANN, BOB, CAT] {
            for miss in town.misses(guest) {
                let action = [ALLOW, ALLOW, DENY, VerdictAction::Drop][next(4) as usize];
                town.answer(guest, &miss, action);
            }
            town.frames(guest);
            assert!(town.engine(guest).flow_count() <= 64);
        }
        if turn % 512 == 0 {
            town.wait(Duration::from_secs(next(300)));
        }
    }
    town.wait(TCP_IDLE + HOLD);
    for guest in [ANN, BOB, CAT] {
        assert_eq!(town.engine(guest).flow_count(), 0, "what is idle ends at both");
    }
}

#[test]
fn the_ends_of_a_flow_are_the_guests_own() {
    // Ann opens to Bob; the flow's key is Ann's, and its id carries her handle.
    let mut town = Town::new();
    let opened = town.connect();
    assert_eq!(opened.vm, VmId(1));
    assert_eq!(crate::message::vm_of_flow(opened.flow), VmId(1));
    let key = opened.subject.key;
    assert_eq!(
        (key.guest, key.peer),
        (
            SocketAddrV4::new(address(ANN), 40_000).into(),
            end(BOB, 80).into()
        )
    );
    // A cut that is sent to Bob by mistake finds the flow at his end, and ends it at both.
    town.order(
        BOB,
        Order::Cut {
            command: CommandId(1),
            flows: vec![opened.flow],
        },
    );
    assert_eq!(closed(&town.reports(ANN)), [(opened.flow, FlowEnd::Cut, 0, 0)]);
}
