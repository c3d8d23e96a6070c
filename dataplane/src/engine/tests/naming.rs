//! Flows whose verdict rests on a name, as guest, server and session meet them.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use vnet_proto::model::{Match, Miss, NameDemand, PortRange, Verdict, VerdictAction, parse_prefix};

use super::kit::*;
use super::town::opened;
use crate::engine::Event;
use crate::engine::inspect::NAME_PATIENCE;
use crate::engine::inspect::quic::tests::{initial_naming, initials_naming};
use crate::engine::inspect::tls::tests::{hello_with, in_records, server_name_extension};
use crate::engine::tcp::DialError;
use crate::message::{FlowEnd, MissEnd, NameRefusal, Order, Report, Settings};

const TLS: (Ipv4Addr, u16) = (SERVER, 443);
const WEB: (Ipv4Addr, u16) = (SERVER, 80);
const SSH: (Ipv4Addr, u16) = (SERVER, 22);

const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
const RST: u8 = 4;

fn hello(name: &str) -> Vec<u8> {
    in_records(
        &hello_with(&[server_name_extension(&[(0, name.as_bytes())])]),
        4000,
    )
}

fn get(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

/// An allow for every port of the server that rests on `allowed.test`.
fn named(miss: &Miss, demand: NameDemand) -> Verdict {
    let mut verdict = verdict(miss, VerdictAction::Allow);
    if let Match::Flow(found) = &mut verdict.found {
        found.prefix = parse_prefix(&SERVER.to_string()).unwrap();
        found.ports = PortRange::ALL;
        found.names_consulted = true;
    }
    verdict.name_demand = demand;
    verdict.names = vec!["allowed.test".parse().unwrap()];
    verdict.grant = "g1".to_owned();
    verdict
}

/// A guest, and how far it has come in what it says.
struct Speaker {
    rig: Rig,
    peer: (Ipv4Addr, u16),
    sequence: u32,
    acknowledgement: u32,
}

impl Speaker {
    /// One that has asked to open a connection, and what it was asked for.
    fn asking(peer: (Ipv4Addr, u16)) -> (Self, Miss) {
        let mut rig = Rig::new();
        learn(&mut rig, "allowed.test");
        rig.syn(peer);
        let miss = rig.misses().remove(0);
        assert_eq!(names_of(&miss), ["allowed.test"]);
        let speaker = Self {
            rig,
            peer,
            sequence: 1001,
            acknowledgement: 0,
        };
        (speaker, miss)
    }

    /// One whose connection was let through under a demand.
    fn under(peer: (Ipv4Addr, u16), demand: NameDemand) -> Self {
        let (mut speaker, miss) = Self::asking(peer);
        let verdict = named(&miss, demand);
        speaker.rig.order(Order::Verdict(Box::new(verdict)));
        speaker.rig.service();
        speaker
    }

    /// One whose SYN must be answered by now.
    fn shake_hands(&mut self) {
        let (flags, sequence, acknowledgement, _) = self.rig.only_segment();
        assert_eq!((flags, acknowledgement), (SYN_ACK, 1001));
        self.acknowledgement = sequence + 1;
        self.rig.tcp(self.peer, ACK, 1001, self.acknowledgement, &[]);
        self.rig.service();
        self.rig.sent();
    }

    fn reading(peer: (Ipv4Addr, u16), demand: NameDemand) -> Self {
        let mut speaker = Self::under(peer, demand);
        speaker.shake_hands();
        speaker
    }

    fn say(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(1400) {
            self.rig
                .tcp(self.peer, ACK, self.sequence, self.acknowledgement, part);
            self.sequence += part.len() as u32;
        }
        self.rig.service();
    }

    fn dials(&self) -> usize {
        let dials = |e: &&Event| matches!(e, Event::Dial { .. });
        self.rig.events.iter().filter(dials).count()
    }

    /// The place of the dial that must have been asked for, answered.
    fn dialled(&mut self) -> usize {
        let (at, to) = self.rig.only_dial();
        assert_eq!(to, (self.peer.0, self.peer.1).into());
        self.rig.engine.handle_dialled(self.rig.now, at);
        self.rig.service();
        at
    }

    /// What goes to the server now, as the driver would move it.
    fn up(&mut self, at: usize) -> Vec<u8> {
        let mut up = Vec::new();
        while let Some(connection) = self.rig.engine.connection(at) {
            let taken = connection
                .lend_received(|bytes| {
                    up.extend_from_slice(bytes);
                    Ok::<_, ()>(bytes.len())
                })
                .unwrap();
            if taken == 0 {
                break;
            }
        }
        self.rig.engine.finish_service(self.rig.now, at);
        self.rig.service();
        up
    }

    fn down(&mut self, at: usize, bytes: &[u8]) {
        let connection = self.rig.engine.connection(at).unwrap();
        let filled = connection.lend_room(|room| {
            room[..bytes.len()].copy_from_slice(bytes);
            Ok::<_, ()>(bytes.len())
        });
        assert_eq!(filled, Ok(bytes.len()));
        self.rig.engine.finish_service(self.rig.now, at);
        self.rig.sent();
    }

    /// The refusal that must have ended the only flow, whose guest must have been reset.
    #[track_caller]
    fn refused(&mut self) -> NameRefusal {
        let sent = self.rig.sent();
        let last = sent.last().expect("nothing was sent to the guest");
        assert_eq!(last[20 + 13] & RST, RST, "the guest is reset");
        assert_eq!(self.rig.engine.flow_count(), 0);
        assert!(
            self.rig
                .events
                .iter()
                .any(|e| matches!(e, Event::Close { reset: true, .. })),
            "the host's side is reset"
        );
        refusal(&self.rig.reports())
    }
}

#[track_caller]
fn refusal(reports: &[Report]) -> NameRefusal {
    let refusals: Vec<_> = reports
        .iter()
        .filter_map(|report| match report {
            Report::FlowClosed {
                end: FlowEnd::NameRefused,
                refusal: Some(refusal),
                bytes_up: _,
                ..
            } => Some((**refusal).clone()),
            _ => None,
        })
        .collect();
    assert_eq!(refusals.len(), 1, "{reports:?}");
    refusals[0].clone()
}

fn learn(rig: &mut Rig, name: &str) {
    let address = IpAddr::V4(SERVER);
    let hour = Duration::from_secs(3600);
    let changed = rig
        .engine
        .bindings
        .learn(rig.now, &name.parse().unwrap(), &[address], hour);
    for address in changed {
        rig.engine.cache.forget_address(address);
    }
}

fn names_of(miss: &Miss) -> Vec<String> {
    let vnet_proto::model::Subject::Flow(flow) = &miss.subject else {
        panic!("not a flow")
    };
    flow.names.iter().map(ToString::to_string).collect()
}

fn count(rig: &Rig, word: &str) -> u64 {
    rig.engine.counters().get(word).copied().unwrap_or(0)
}

#[test]
fn where_a_name_is_required_the_guest_is_answered_first_and_dialled_is_what_it_names() {
    let mut speaker = Speaker::reading(TLS, NameDemand::ByPort);
    assert_eq!(speaker.dials(), 0, "nothing is dialled before the name");
    let hello = hello("allowed.test");
    speaker.say(&hello);
    let at = speaker.dialled();
    assert_eq!(
        speaker.up(at),
        hello,
        "what was read goes up whole, from the first byte"
    );
    assert!(speaker.rig.engine.connection(at).unwrap().check.is_some());
    speaker.say(b"\x14\x03\x03\x00\x01\x01\x17\x03\x03\x00\x02ab");
    assert_eq!(speaker.up(at), b"\x14\x03\x03\x00\x01\x01\x17\x03\x03\x00\x02ab");
    assert!(
        speaker.rig.engine.connection(at).unwrap().check.is_none(),
        "past its name it is a connection like any other"
    );
}

#[test]
fn a_name_in_segments_of_one_byte_is_read() {
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    let hello = hello("allowed.test");
    for (index, byte) in hello.iter().enumerate() {
        assert_eq!(speaker.dials(), 0, "at byte {index}");
        speaker.say(&[*byte]);
    }
    let at = speaker.dialled();
    assert_eq!(speaker.up(at), hello);
}

#[test]
fn another_name_or_none_is_refused_before_anything_is_dialled() {
    let nameless = in_records(&hello_with(&[]), 4000);
    for (peer, said, word) in [
        (TLS, hello("denied.test"), "name_mismatch"),
        (TLS, nameless, "name_missing"),
        (TLS, get("allowed.test"), "name_unreadable"),
        (WEB, get("denied.test"), "name_mismatch"),
        (
            WEB,
            b"CONNECT allowed.test:70000 HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
            "name_malformed",
        ),
        (WEB, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), "h2c_denied"),
        (WEB, hello("allowed.test"), "name_unreadable"),
    ] {
        let mut speaker = Speaker::reading(peer, NameDemand::ByPort);
        speaker.say(&said);
        assert_eq!(speaker.dials(), 0, "{word}");
        let refusal = speaker.refused();
        assert_eq!(refusal.word, word);
        assert_eq!(refusal.wanted, ["allowed.test".parse().unwrap()]);
        let spoken = (word == "name_mismatch").then(|| "denied.test".parse().unwrap());
        assert_eq!(refusal.spoken, spoken);
        assert_eq!(count(&speaker.rig, word), 1);
    }
}

#[test]
fn silence_is_refused_after_five_seconds_and_not_before() {
    for said in [&b""[..], &hello("allowed.test")[..40]] {
        let mut speaker = Speaker::reading(TLS, NameDemand::Require);
        speaker.say(said);
        speaker.rig.sent();
        speaker
            .rig
            .wait(NAME_PATIENCE.checked_sub(Duration::from_millis(10)).unwrap());
        assert_eq!(speaker.rig.engine.flow_count(), 1);
        speaker.rig.wait(Duration::from_millis(20));
        assert_eq!(speaker.dials(), 0);
        assert_eq!(speaker.refused().word, "name_late");
    }
}

#[test]
fn a_cache_hit_demands_what_the_miss_did() {
    let mut speaker = Speaker::reading(TLS, NameDemand::ByPort);
    speaker.say(&hello("denied.test"));
    assert_eq!(speaker.refused().word, "name_mismatch");
    for (peer, said, word) in [
        (TLS, hello("denied.test"), "name_mismatch"),
        (WEB, get("denied.test"), "name_mismatch"),
        ((SERVER, 8443), hello("denied.test"), "name_mismatch"),
    ] {
        speaker.peer = peer;
        speaker.sequence = 1001;
        speaker.rig.syn(peer);
        assert!(speaker.rig.misses().is_empty(), "{peer:?} is a hit");
        if peer.1 == 8443 {
            // Nothing is required there: dialled at once.
            let at = speaker.dialled();
            speaker.shake_hands();
            speaker.say(&said);
            assert!(speaker.up(at).is_empty());
        } else {
            speaker.rig.service();
            speaker.shake_hands();
            speaker.say(&said);
        }
        assert_eq!(speaker.refused().word, word);
    }
}

#[test]
fn a_destination_that_cannot_be_reached_resets_a_guest_that_was_answered_already() {
    for timed_out in [false, true] {
        let mut speaker = Speaker::reading(TLS, NameDemand::Require);
        speaker.say(&hello("allowed.test"));
        speaker.rig.sent();
        let (at, _) = speaker.rig.only_dial();
        if timed_out {
            speaker.rig.wait(Duration::from_secs(31));
        } else {
            speaker
                .rig
                .engine
                .handle_refused(speaker.rig.now, at, DialError::Refused);
            speaker.rig.service();
        }
        let sent = speaker.rig.sent();
        assert_eq!(sent.last().unwrap()[20 + 13] & RST, RST);
        assert!(speaker.rig.reports().iter().any(|r| matches!(
            r,
            Report::FlowClosed {
                end: FlowEnd::Unreachable,
                refusal: None,
                ..
            }
        )));
    }
}

#[test]
fn a_guest_that_gives_up_while_it_is_read_leaves_nothing_behind() {
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    speaker.say(&hello("allowed.test")[..10]);
    let (sequence, acknowledgement) = (speaker.sequence, speaker.acknowledgement);
    speaker
        .rig
        .tcp(speaker.peer, RST | ACK, sequence, acknowledgement, &[]);
    speaker.rig.service();
    assert_eq!(speaker.rig.engine.flow_count(), 0);
    assert_eq!(speaker.dials(), 0);
    // A guest that was started anew uses the same ports again.
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    speaker.rig.tcp(TLS, 2, 77_000, 0, &[]);
    speaker.rig.service();
    assert_eq!(speaker.rig.engine.flow_count(), 1);
    assert_eq!(speaker.rig.only_segment().2, 77_001);
}

#[test]
fn a_verdict_that_went_while_the_name_was_read_is_asked_for_again_and_nothing_is_dialled_on_it() {
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    speaker.rig.reports();
    speaker.rig.next_epoch();
    let hello = hello("allowed.test");
    speaker.say(&hello);
    assert_eq!(speaker.dials(), 0);
    let miss = speaker.rig.misses().remove(0);
    let mut fresh = named(&miss, NameDemand::Require);
    fresh.epoch = EPOCH.next();
    speaker.rig.order(Order::Verdict(Box::new(fresh)));
    let at = speaker.dialled();
    assert_eq!(speaker.up(at), hello);
}

#[test]
fn a_new_verdict_holds_what_was_said_to_its_own_names_and_a_refusal_cuts() {
    for (action, names) in [
        (VerdictAction::Allow, vec!["other.test".parse().unwrap()]),
        (VerdictAction::Deny, Vec::new()),
        (VerdictAction::Drop, Vec::new()),
    ] {
        let mut speaker = Speaker::reading(TLS, NameDemand::Require);
        speaker.rig.reports();
        speaker.rig.next_epoch();
        speaker.say(&hello("allowed.test"));
        let miss = speaker.rig.misses().remove(0);
        let mut fresh = named(&miss, NameDemand::Require);
        (fresh.epoch, fresh.action, fresh.names) = (EPOCH.next(), action, names);
        speaker.rig.order(Order::Verdict(Box::new(fresh)));
        assert_eq!(speaker.dials(), 0);
        assert_eq!(speaker.rig.engine.flow_count(), 0);
        assert_eq!(speaker.rig.sent().last().unwrap()[20 + 13] & RST, RST);
        let ends: Vec<_> = speaker
            .rig
            .reports()
            .iter()
            .filter_map(|r| match r {
                Report::FlowClosed { end, .. } => Some(*end),
                _ => None,
            })
            .collect();
        let expected = match action {
            VerdictAction::Allow => FlowEnd::NameRefused,
            _ => FlowEnd::Cut,
        };
        assert_eq!(ends, [expected]);
    }
}

#[test]
fn the_session_is_told_which_names_a_flow_may_speak_and_no_later_verdict_adds_one() {
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    let opened = opened(&speaker.rig.reports());
    assert_eq!(opened[0].names, ["allowed.test".parse().unwrap()]);
    speaker.rig.next_epoch();
    speaker.say(&hello("allowed.test"));
    let miss = speaker.rig.misses().remove(0);
    let mut fresh = named(&miss, NameDemand::Require);
    fresh.epoch = EPOCH.next();
    fresh.names.push("other.test".parse().unwrap());
    speaker.rig.order(Order::Verdict(Box::new(fresh.clone())));
    // Another name that is allowed at the address by now is none of this flow's, and does it no harm.
    assert_eq!((speaker.dials(), speaker.rig.engine.flow_count()), (1, 1));

    for (names, first) in [
        (&["allowed.test", "other.test"][..], ""),
        (&["other.test"][..], "allowed.test"),
    ] {
        let mut speaker = Speaker::reading(TLS, NameDemand::Require);
        speaker.rig.next_epoch();
        speaker.say(&hello(if first.is_empty() { "other.test" } else { first }));
        // By the first list alone the name is refused at once; where nothing of it is left, by the verdict.
        if let Some(miss) = speaker.rig.misses().pop() {
            let mut fresh = named(&miss, NameDemand::Require);
            fresh.epoch = EPOCH.next();
            fresh.names = names.iter().map(|name| name.parse().unwrap()).collect();
            speaker.rig.order(Order::Verdict(Box::new(fresh)));
        }
        assert_eq!(
            (speaker.dials(), speaker.rig.engine.flow_count()),
            (0, 0),
            "{names:?}"
        );
    }
}

#[test]
fn what_a_new_flow_must_pass_is_passed_again_before_the_dial() {
    // Another name came to the address: a rule about that one may come first.
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    learn(&mut speaker.rig, "other.test");
    speaker.say(&hello("allowed.test"));
    assert_eq!((speaker.dials(), speaker.rig.misses().len()), (0, 1));

    // The lease ran out: no controlplane is there.
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    speaker.rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    speaker.rig.reports();
    speaker.say(&hello("allowed.test"));
    assert_eq!(speaker.dials(), 0);
    assert_eq!(speaker.rig.misses().len(), 1);
    speaker.rig.wait(HOLD);
    assert_eq!(
        speaker.rig.engine.flow_count(),
        0,
        "nobody answered before its hold was over"
    );
    let reports = speaker.rig.reports();
    assert_eq!(
        ended(&reports).iter().map(|(_, end)| *end).collect::<Vec<_>>(),
        [MissEnd::HoldExpired]
    );

    // Its grant ended meanwhile.
    let (mut speaker, miss) = Speaker::asking(TLS);
    let mut verdict = named(&miss, NameDemand::Require);
    verdict.expires_in = Some(Duration::from_secs(2));
    speaker.rig.order(Order::Verdict(Box::new(verdict)));
    speaker.rig.service();
    speaker.shake_hands();
    speaker.rig.wait(Duration::from_secs(3));
    assert_eq!(speaker.rig.engine.flow_count(), 0);
    assert!(speaker.rig.reports().iter().any(|r| matches!(
        r,
        Report::FlowClosed {
            end: FlowEnd::GrantEnded,
            ..
        }
    )));
}

#[test]
fn a_flow_whose_name_is_read_is_live_and_can_be_cut() {
    let mut speaker = Speaker::reading(TLS, NameDemand::Require);
    let flow = speaker
        .rig
        .reports()
        .iter()
        .find_map(|r| match r {
            Report::FlowOpened(opened) => Some(opened.flow),
            _ => None,
        })
        .expect("the session knows of it");
    speaker.rig.order(Order::Cut {
        command: vnet_proto::model::CommandId(1),
        flows: vec![flow],
    });
    assert_eq!(speaker.rig.sent().last().unwrap()[20 + 13] & RST, RST);
    speaker.say(&hello("allowed.test"));
    assert_eq!(speaker.dials(), 0);
}

#[test]
fn a_name_for_once_is_required_too_and_dialled_once() {
    let (mut speaker, miss) = Speaker::asking(TLS);
    let mut verdict = named(&miss, NameDemand::ByPort);
    verdict.once = true;
    speaker.rig.order(Order::Verdict(Box::new(verdict)));
    speaker.rig.service();
    speaker.shake_hands();
    speaker.say(&hello("allowed.test"));
    assert!(speaker.rig.misses().is_empty(), "its verdict still stands");
    speaker.dialled();
}

#[test]
fn a_server_that_speaks_first_loses_no_time_where_a_name_need_only_match() {
    let mut speaker = Speaker::under(SSH, NameDemand::ByPort);
    assert_eq!(speaker.dials(), 1, "dialled on the binding alone");
    let at = speaker.dialled();
    speaker.shake_hands();
    let connection = speaker.rig.engine.connection(at).unwrap();
    let greeting = b"SSH-2.0-OpenSSH_9.2\r\n";
    let filled = connection.lend_room(|room| {
        room[..greeting.len()].copy_from_slice(greeting);
        Ok::<_, ()>(greeting.len())
    });
    assert_eq!(filled, Ok(greeting.len()));
    speaker.rig.engine.finish_service(speaker.rig.now, at);
    assert_eq!(
        speaker.rig.only_segment().3,
        greeting,
        "the greeting waits for nothing"
    );
    speaker.say(b"SSH-2.0-OpenSSH_9.9\r\n");
    assert_eq!(speaker.up(at), b"SSH-2.0-OpenSSH_9.9\r\n");
    assert!(speaker.rig.engine.connection(at).unwrap().check.is_none());
    speaker.rig.wait(Duration::from_secs(60));
    assert_eq!(speaker.rig.engine.flow_count(), 1, "it has no clock of names");
}

#[test]
fn where_a_name_need_only_match_another_one_is_cut_before_it_goes_up() {
    for said in [hello("denied.test"), get("denied.test")] {
        let mut speaker = Speaker::under(SSH, NameDemand::IfPresent);
        let at = speaker.dialled();
        speaker.shake_hands();
        speaker.say(&said);
        assert_eq!(speaker.up(at), b"");
        assert_eq!(speaker.refused().word, "name_mismatch");
    }
}

#[test]
fn half_of_what_may_become_a_name_is_held_and_then_refused() {
    let mut speaker = Speaker::under(SSH, NameDemand::IfPresent);
    let at = speaker.dialled();
    speaker.shake_hands();
    speaker.say(b"GET / HT");
    assert_eq!(speaker.up(at), b"");
    speaker.rig.sent();
    speaker.rig.wait(NAME_PATIENCE + Duration::from_millis(1));
    assert_eq!(speaker.refused().word, "name_late");
}

#[test]
fn every_request_of_a_connection_is_held_to_the_name() {
    let mut speaker = Speaker::reading(WEB, NameDemand::ByPort);
    let first = [&get("allowed.test")[..], &get("allowed.test")].concat();
    speaker.say(&first);
    let at = speaker.dialled();
    assert_eq!(speaker.up(at), first);
    speaker.down(at, b"HTTP/1.1 204 No Content\r\n\r\n");
    speaker.rig.wait(Duration::from_secs(60));
    assert_eq!(
        speaker.rig.engine.flow_count(),
        1,
        "between requests it may be silent"
    );
    speaker.say(&get("denied.test"));
    assert_eq!(speaker.up(at), b"");
    assert_eq!(speaker.refused().word, "name_mismatch");
}

#[test]
fn of_pipelined_requests_none_passes_that_follows_another_host() {
    let mut speaker = Speaker::reading(WEB, NameDemand::ByPort);
    speaker.say(&[&get("allowed.test")[..], &get("denied.test")].concat());
    assert_eq!(
        (speaker.dials(), speaker.refused().word),
        (0, "name_mismatch"),
        "the connection is refused as a whole"
    );
}

#[test]
fn requests_are_followed_over_the_end_of_the_ring() {
    // More than the ring is long, so that heads lie across its end.
    let mut speaker = Speaker::reading(WEB, NameDemand::ByPort);
    let filler = "x".repeat(1000);
    let one = format!("GET / HTTP/1.1\r\nHost: allowed.test\r\nX: {filler}\r\n\r\n").into_bytes();
    speaker.say(&one);
    let at = speaker.dialled();
    let mut up = speaker.up(at);
    let rounds = crate::engine::ring::RECEIVE_BYTES / one.len() + 50;
    for round in 0..rounds {
        let (head, tail) = one.split_at(round % one.len());
        speaker.say(head);
        up.extend(speaker.up(at));
        speaker.say(tail);
        up.extend(speaker.up(at));
        speaker.rig.sent();
    }
    assert_eq!(up.len(), one.len() * (rounds + 1));
    speaker.say(&get("denied.test"));
    speaker.up(at);
    assert_eq!(speaker.refused().word, "name_mismatch");
}

#[test]
fn after_a_switch_of_protocols_nothing_is_checked_and_before_it_nothing_passes() {
    let mut speaker = Speaker::reading(WEB, NameDemand::ByPort);
    let upgrade =
        b"GET /chat HTTP/1.1\r\nHost: allowed.test\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    speaker.say(upgrade);
    let at = speaker.dialled();
    assert_eq!(speaker.up(at), upgrade);
    speaker.say(b"\x81\x01a");
    assert_eq!(
        speaker.up(at),
        b"",
        "whose bytes these are is the server's to say"
    );
    speaker.down(
        at,
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    );
    assert_eq!(speaker.up(at), b"\x81\x01a");
    assert!(speaker.rig.engine.connection(at).unwrap().check.is_none());
}

#[test]
fn a_tunnel_to_a_port_that_the_verdict_is_not_for_is_refused() {
    let (mut speaker, miss) = Speaker::asking(WEB);
    let mut verdict = named(&miss, NameDemand::ByPort);
    if let Match::Flow(found) = &mut verdict.found {
        found.ports = PortRange::one(80);
    }
    speaker.rig.order(Order::Verdict(Box::new(verdict)));
    speaker.rig.service();
    speaker.shake_hands();
    speaker.say(b"CONNECT allowed.test:443 HTTP/1.1\r\nHost: allowed.test:443\r\n\r\n");
    assert_eq!(speaker.dials(), 0);
    let refusal = speaker.refused();
    assert_eq!(refusal.word, "name_mismatch");
    assert!(refusal.text.contains("at port 443"), "{}", refusal.text);
}

#[test]
fn a_hello_that_hides_its_name_is_refused_unless_the_policy_says_otherwise() {
    let hidden = in_records(
        &hello_with(&[
            server_name_extension(&[(0, b"allowed.test")]),
            (0xffce, vec![1; 40]),
        ]),
        4000,
    );
    let mut speaker = Speaker::reading(TLS, NameDemand::ByPort);
    speaker.say(&hidden);
    assert_eq!(speaker.refused().word, "ech_denied");

    let (mut speaker, miss) = Speaker::asking(TLS);
    speaker.rig.order(Order::Settings(guarding(false, false)));
    let verdict = named(&miss, NameDemand::ByPort);
    speaker.rig.order(Order::Verdict(Box::new(verdict)));
    speaker.rig.service();
    speaker.shake_hands();
    speaker.say(&hidden);
    speaker.dialled();
}

fn guarding(deny_ech: bool, deny_quic: bool) -> Settings {
    Settings {
        deny_ech,
        deny_quic,
        ..settings()
    }
}

fn payloads(rig: &mut Rig) -> Vec<Vec<u8>> {
    let mut payloads = Vec::new();
    rig.events.retain_mut(|event| match event {
        Event::Send { packets, .. } => {
            payloads.extend(packets.drain(..).map(Vec::from));
            false
        }
        _ => true,
    });
    payloads
}

/// A guest whose association to the server's port 443 was let through when it sent this.
fn association(first: &[u8], demand: NameDemand, settings: Settings) -> Rig {
    let mut rig = Rig::new();
    learn(&mut rig, "allowed.test");
    rig.order(Order::Settings(settings));
    rig.ip(&udp(TLS, first));
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(named(&miss, demand))));
    rig
}

#[test]
fn quic_waits_until_its_name_is_whole_and_then_goes_out_in_order() {
    let [first, second] = initials_naming("allowed.test");
    let mut rig = association(&first, NameDemand::ByPort, guarding(true, false));
    assert!(payloads(&mut rig).is_empty());
    rig.ip(&udp(TLS, &second));
    assert_eq!(payloads(&mut rig), [first, second]);
    // What follows an agreed name passes, and another association that hits the cache is held likewise.
    rig.ip(&udp(TLS, &[0x40; 60]));
    assert_eq!(payloads(&mut rig), [[0x40; 60]]);
}

#[test]
fn quic_under_another_name_goes_nowhere_and_the_guest_is_told() {
    let bad = initial_naming("denied.test");
    for hit in [false, true] {
        let mut rig = association(
            &if hit {
                initial_naming("allowed.test")
            } else {
                bad.clone()
            },
            NameDemand::ByPort,
            guarding(true, false),
        );
        if hit {
            assert_eq!(payloads(&mut rig).len(), 1);
            let other: Vec<u8> = {
                let mut packet = udp(TLS, &bad);
                packet[20..22].copy_from_slice(&50_001u16.to_be_bytes());
                packet
            };
            rig.ip(&other);
        }
        assert!(payloads(&mut rig).is_empty());
        assert_eq!(rig.only_icmp(), (3, 13));
        let reports = rig.reports();
        assert!(!reports.iter().any(|r| matches!(r, Report::Miss(_))));
        let refusal = refusal(&reports);
        assert_eq!(
            (refusal.word, refusal.spoken),
            ("name_mismatch", Some("denied.test".parse().unwrap()))
        );
    }
}

#[test]
fn quic_that_does_not_finish_its_name_ends_after_five_seconds() {
    let [first, _] = initials_naming("allowed.test");
    let mut rig = association(&first, NameDemand::ByPort, guarding(true, false));
    rig.reports();
    rig.wait(NAME_PATIENCE + Duration::from_millis(1));
    assert!(payloads(&mut rig).is_empty());
    assert_eq!(rig.only_icmp(), (3, 13));
    assert_eq!(refusal(&rig.reports()).word, "name_late");
}

#[test]
fn quic_is_refused_where_the_policy_says_so_and_other_datagrams_are_not() {
    let good = initial_naming("allowed.test");
    let mut rig = association(&good, NameDemand::IfPresent, guarding(true, true));
    assert!(payloads(&mut rig).is_empty());
    assert_eq!(refusal(&rig.reports()).word, "quic_denied");
    let mut rig = association(b"not quic", NameDemand::IfPresent, guarding(true, true));
    assert_eq!(payloads(&mut rig), [b"not quic"]);
}

#[test]
fn what_no_name_can_be_read_in_is_denied_where_one_is_required() {
    let mut rig = Rig::new();
    learn(&mut rig, "allowed.test");
    rig.ip(&echo(SERVER, 5, b"ping"));
    let miss = rig.misses().remove(0);
    let mut verdict = named(&miss, NameDemand::Require);
    let vnet_proto::model::Subject::Flow(flow) = &miss.subject else {
        panic!()
    };
    verdict.found = Match::Flow(vnet_proto::model::FlowMatch::exact(&flow.key));
    rig.order(Order::Verdict(Box::new(verdict)));
    assert!(payloads(&mut rig).is_empty());
    assert_eq!(rig.only_icmp(), (3, 13));
    rig.ip(&echo(SERVER, 5, b"ping"));
    assert!(payloads(&mut rig).is_empty(), "a hit, too");
    rig.wait(Duration::from_secs(1));
    let told = rig.reports().into_iter().any(
        |r| matches!(r, Report::Decided { action: VerdictAction::Deny, reason, .. } if reason.step == "name"),
    );
    assert!(told, "the session hears of it");
}
