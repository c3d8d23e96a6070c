//! Synthetic answers: an address at once, the lookup and the connection only after the yes.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{RData, Record, RecordType};
use vnet_proto::model::{Guard, Match, Miss, NameDemand, Subject, Verdict, VerdictAction};

use super::kit::*;
use crate::engine::Event;
use crate::engine::inspect::tls::tests::{hello_with, in_records, server_name_extension};
use crate::engine::synthetic::table::Synthetics;
use crate::message::{Order, Report, Settings};

const REAL: &str = "203.0.113.80";

fn synthetic_rig() -> Rig {
    let mut rig = Rig::new();
    answer_synthetically(&mut rig, true);
    rig
}

fn answer_synthetically(rig: &mut Rig, synthetic_answers: bool) {
    rig.order(Order::Settings(Settings {
        synthetic_answers,
        ..settings()
    }));
}

fn ask(rig: &mut Rig, name: &str, query_type: RecordType) {
    let mut message = Message::query();
    message.metadata.id = 7;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.parse().unwrap(), query_type));
    rig.ip(&udp((GATEWAY, 53), &message.to_vec().unwrap()));
}

fn lookup_verdict(miss: &Miss, action: VerdictAction, synthetic_only: bool) -> Verdict {
    Verdict {
        synthetic_only,
        ..verdict(miss, action)
    }
}

fn answered(rig: &mut Rig) -> Message {
    let (_, payload) = rig.only_datagram();
    Message::from_vec(&payload).unwrap()
}

/// The guest looks a name up; the address that it is told.
fn look_up(rig: &mut Rig, name: &str) -> Ipv4Addr {
    ask(rig, name, RecordType::A);
    if let Some(miss) = rig.misses().pop() {
        rig.order(Order::Verdict(Box::new(lookup_verdict(
            &miss,
            VerdictAction::Allow,
            true,
        ))));
    }
    let message = answered(rig);
    match &message.answers[0].data {
        RData::A(a) => a.0,
        other => panic!("{other:?}"),
    }
}

/// Takes the lookups that go upstream: number and question.
fn upstream(rig: &mut Rig) -> Vec<(u64, String, RecordType)> {
    let (lookups, others) = std::mem::take(&mut rig.events)
        .into_iter()
        .partition::<Vec<_>, _>(|e| matches!(e, Event::Resolve { .. }));
    rig.events = others;
    lookups
        .into_iter()
        .map(|e| {
            let Event::Resolve { query, bytes, .. } = e else {
                unreachable!()
            };
            let message = Message::from_vec(&bytes).unwrap();
            let q = &message.queries[0];
            (query, q.name.to_string(), q.query_type)
        })
        .collect()
}

fn resolved(rig: &mut Rig, (query, name, query_type): &(u64, String, RecordType), addresses: &[&str]) {
    let mut message = Message::response(0, hickory_proto::op::OpCode::Query);
    message.add_query(Query::query(name.parse().unwrap(), *query_type));
    for address in addresses {
        let data = match address.parse().unwrap() {
            IpAddr::V4(v4) => RData::A(v4.into()),
            IpAddr::V6(v6) => RData::AAAA(v6.into()),
        };
        message.add_answers([Record::from_rdata(name.parse().unwrap(), 300, data)]);
    }
    let bytes = message.to_vec().unwrap();
    rig.engine.handle_resolved(rig.now, *query, Some(bytes));
    while let Some(event) = rig.engine.poll_event() {
        rig.events.push(event);
    }
}

fn flow_miss(rig: &mut Rig) -> Miss {
    let mut misses = rig.misses();
    assert_eq!(misses.len(), 1, "{misses:?}");
    misses.remove(0)
}

/// A connection whose name is allowed; the lookup that follows.
fn allowed(rig: &mut Rig, peer: (Ipv4Addr, u16)) -> (u64, String, RecordType) {
    rig.syn(peer);
    let miss = flow_miss(rig);
    rig.answer(&miss, VerdictAction::Allow);
    upstream(rig).remove(0)
}

fn subject(miss: &Miss) -> &vnet_proto::model::FlowSubject {
    let Subject::Flow(flow) = &miss.subject else {
        panic!("not a flow: {miss:?}")
    };
    flow
}

fn once(miss: &Miss, action: VerdictAction) -> Order {
    Order::Verdict(Box::new(Verdict {
        once: true,
        ..verdict(miss, action)
    }))
}

#[test]
fn a_connection_is_asked_about_by_name_before_a_byte_of_dns_leaves() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    assert_eq!(upstream(&mut rig), []);

    rig.syn((address, 443));
    let miss = flow_miss(&mut rig);
    assert_eq!(subject(&miss).names, ["api.example.test".parse().unwrap()]);
    assert!(subject(&miss).guards.contains(Guard::Synthetic));
    assert_eq!(subject(&miss).dialled, IpAddr::from(address));
    assert_eq!(upstream(&mut rig), []);

    rig.answer(&miss, VerdictAction::Allow);
    let lookups = upstream(&mut rig);
    assert_eq!(lookups.len(), 1);
    assert_eq!(&lookups[0].1, "api.example.test.");
    resolved(&mut rig, &lookups[0], &[REAL]);

    let judged = flow_miss(&mut rig);
    assert_eq!(subject(&judged).dialled, REAL.parse::<IpAddr>().unwrap());
    assert_eq!(subject(&judged).key.peer.ip(), IpAddr::from(address));
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    rig.order(once(&judged, VerdictAction::Allow));
    let (at, to) = rig.only_dial();
    assert_eq!(to, format!("{REAL}:443").parse().unwrap());

    // The guest sees the address that it was told.
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let sent = rig.sent();
    assert_eq!(&sent[0][12..16], &address.octets());
}

#[test]
fn the_next_connection_asks_nobody_and_looks_nothing_up() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    let lookup = allowed(&mut rig, (address, 443));
    resolved(&mut rig, &lookup, &[REAL]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    rig.only_dial();
    rig.reports();

    let mut second = segment((address, 443), 2, 5000, 0, &[]);
    second[21] ^= 1;
    rig.ip(&second);
    assert_eq!(rig.misses().len(), 0);
    rig.only_dial();

    // Under another epoch, everything is asked anew.
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    let mut third = segment((address, 443), 2, 9000, 0, &[]);
    third[21] ^= 3;
    rig.ip(&third);
    assert_eq!(subject(&flow_miss(&mut rig)).dialled, IpAddr::from(address));
}

#[test]
fn what_the_name_stands_for_may_still_be_refused() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "rebind.test.");
    let lookup = allowed(&mut rig, (address, 80));
    resolved(&mut rig, &lookup, &["10.0.0.1"]);
    let judged = flow_miss(&mut rig);
    assert!(subject(&judged).guards.contains(Guard::PrivateFromDns));
    rig.order(once(&judged, VerdictAction::Deny));
    assert_eq!(rig.only_segment().0 & 4, 4);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_name_for_loopback_or_the_guests_network_is_not_even_asked_about() {
    for (name, real) in [
        ("lo.test.", "127.0.0.1"),
        ("link.test.", "192.168.127.9"),
        ("multi.test.", "224.0.0.1"),
    ] {
        let mut rig = synthetic_rig();
        let address = look_up(&mut rig, name);
        let lookup = allowed(&mut rig, (address, 80));
        resolved(&mut rig, &lookup, &[real]);
        assert_eq!(rig.misses().len(), 0, "{name}");
        assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
        assert_eq!(rig.engine.flow_count(), 0, "{name}");
        assert_eq!(rig.sent().len(), 1, "{name}: the guest is told");
    }
}

#[test]
fn a_name_that_stands_for_nothing_is_unreachable() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "nothing.test.");
    let a = allowed(&mut rig, (address, 443));
    resolved(&mut rig, &a, &[]);
    let aaaa = upstream(&mut rig).remove(0);
    assert_eq!(aaaa.2, RecordType::AAAA, "the other family is tried");
    rig.engine.handle_resolved(rig.now, aaaa.0, None);
    assert_eq!(rig.only_icmp(), (3, 1));
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_lookup_that_nobody_answers_ends() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "slow.test.");
    let lookup = allowed(&mut rig, (address, 443));
    rig.wait(Duration::from_secs(21));
    assert_eq!(rig.only_segment().0 & 4, 4);
    assert_eq!(rig.engine.flow_count(), 0);
    resolved(&mut rig, &lookup, &[REAL]);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
}

#[test]
fn a_yes_that_was_taken_back_during_the_lookup_is_asked_for_again() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    let lookup = allowed(&mut rig, (address, 443));
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    resolved(&mut rig, &lookup, &[REAL]);
    let again = flow_miss(&mut rig);
    assert_eq!(subject(&again).dialled, IpAddr::from(address), "by its name");
    let mut denied = verdict(&again, VerdictAction::Deny);
    denied.epoch = EPOCH.next();
    rig.order(Order::Verdict(Box::new(denied)));
    assert_eq!(rig.only_segment().0 & 4, 4);
}

#[test]
fn a_yes_for_once_serves_one_connection_through_both_judgements() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    rig.syn((address, 443));
    let miss = flow_miss(&mut rig);
    rig.order(once(&miss, VerdictAction::Allow));
    let lookup = upstream(&mut rig).remove(0);
    resolved(&mut rig, &lookup, &[REAL]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    rig.only_dial();
    rig.reports();
    let mut second = segment((address, 443), 2, 5000, 0, &[]);
    second[21] ^= 1;
    rig.ip(&second);
    assert_eq!(subject(&flow_miss(&mut rig)).dialled, IpAddr::from(address));
}

#[test]
fn datagrams_wait_for_the_lookup_and_go_on_in_order() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "time.test.");
    for payload in [b"one", b"two"] {
        rig.ip(&udp((address, 123), payload));
    }
    let miss = flow_miss(&mut rig);
    rig.answer(&miss, VerdictAction::Allow);
    rig.ip(&udp((address, 123), b"three"));
    let lookup = upstream(&mut rig).remove(0);
    resolved(&mut rig, &lookup, &[REAL]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    let sent: Vec<_> = rig
        .events
        .iter()
        .filter_map(|e| match e {
            Event::Send { flow, packets } => Some((*flow, packets.clone())),
            _ => None,
        })
        .collect();
    assert_eq!(sent.len(), 1);
    let packets: Vec<&[u8]> = sent[0].1.iter().map(|p| &p[..]).collect();
    assert_eq!(packets, [&b"one"[..], b"two", b"three"]);
    let flow = rig.engine.flow(sent[0].0).unwrap();
    assert_eq!(flow.dialled, format!("{REAL}:123").parse().unwrap());
    // The answer comes from the address that the guest knows.
    rig.engine.handle_datagram(rig.now, sent[0].0, b"now");
    let packet = rig.sent().remove(0);
    assert_eq!(&packet[12..16], &address.octets());
}

#[test]
fn under_a_name_that_is_only_asked_for_no_other_type_goes_upstream() {
    let mut rig = synthetic_rig();
    look_up(&mut rig, "asked.test.");
    for query_type in [
        RecordType::TXT,
        RecordType::HTTPS,
        RecordType::AAAA,
        RecordType::MX,
        RecordType::ANY,
    ] {
        ask(&mut rig, "asked.test.", query_type);
        let message = answered(&mut rig);
        assert_eq!(message.metadata.response_code, ResponseCode::NoError);
        assert_eq!(message.answers.len(), 0, "{query_type}");
    }
    assert_eq!(upstream(&mut rig), []);
}

#[test]
fn under_a_name_that_is_allowed_other_types_do() {
    let mut rig = synthetic_rig();
    ask(&mut rig, "allowed.test.", RecordType::MX);
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(lookup_verdict(
        &miss,
        VerdictAction::Allow,
        false,
    ))));
    let types: Vec<_> = upstream(&mut rig).into_iter().map(|(_, _, t)| t).collect();
    assert_eq!(types, [RecordType::MX]);
    ask(&mut rig, "allowed.test.", RecordType::A);
    assert_eq!(answered(&mut rig).answers.len(), 1);
    ask(&mut rig, "allowed.test.", RecordType::HTTPS);
    assert_eq!(answered(&mut rig).answers.len(), 0);
    assert_eq!(upstream(&mut rig), []);
}

#[test]
fn an_address_of_the_range_that_stands_for_no_name_leads_nowhere() {
    let mut rig = synthetic_rig();
    look_up(&mut rig, "one.test.");
    rig.syn((Ipv4Addr::new(198, 18, 9, 9), 443));
    assert_eq!(rig.misses().len(), 0);
    assert_eq!(rig.only_icmp().0, 3);
}

#[test]
fn an_address_that_is_given_on_takes_no_verdict_with_it() {
    let mut rig = synthetic_rig();
    rig.engine.synthetics = Synthetics::with_capacity(1);
    let address = look_up(&mut rig, "one.test.");
    let no = |rig: &mut Rig| {
        rig.syn((address, 443));
        let miss = flow_miss(rig);
        let mut verdict = verdict(&miss, VerdictAction::Deny);
        if let Match::Flow(found) = &mut verdict.found {
            found.names_consulted = true;
        }
        rig.order(Order::Verdict(Box::new(verdict)));
        rig.sent();
        subject(&miss)
            .names
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(no(&mut rig), ["one.test"]);
    rig.syn((address, 443));
    assert!(rig.misses().is_empty(), "it is remembered");
    rig.sent();
    rig.wait(Duration::from_secs(200));
    assert_eq!(look_up(&mut rig, "two.test."), address);
    assert_eq!(no(&mut rig), ["two.test"]);
}

#[test]
fn an_address_is_one_guests_own() {
    let (mut one, mut two) = (synthetic_rig(), synthetic_rig());
    let address = look_up(&mut one, "one.test.");
    two.syn((address, 443));
    assert_eq!(two.only_icmp().0, 3, "it stands for nothing there");
    assert_eq!(look_up(&mut two, "two.test."), address);
    two.syn((address, 443));
    assert_eq!(subject(&flow_miss(&mut two)).names, ["two.test".parse().unwrap()]);
}

#[test]
fn a_verdict_that_asks_for_synthetic_answers_is_kept_even_where_they_are_off() {
    let mut rig = Rig::new();
    let address = look_up(&mut rig, "early.test.");
    assert_eq!(address.octets()[..2], [198, 18]);
    assert_eq!(upstream(&mut rig), []);
}

#[test]
fn switched_off_real_addresses_are_told_again_and_flows_live_on() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    answer_synthetically(&mut rig, false);
    ask(&mut rig, "other.test.", RecordType::A);
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(lookup_verdict(
        &miss,
        VerdictAction::Allow,
        false,
    ))));
    assert_eq!(upstream(&mut rig).len(), 1);
    rig.syn((address, 443));
    assert!(subject(&flow_miss(&mut rig)).guards.contains(Guard::Synthetic));
}

#[test]
fn a_million_names_meet_the_end_of_the_range_and_it_is_said() {
    let mut rig = synthetic_rig();
    // One verdict for every name, as a policy that allows all gives it.
    ask(&mut rig, "first.test.", RecordType::A);
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(Verdict {
        synthetic_only: true,
        ..every_lookup(&miss)
    })));
    rig.frames();
    rig.events.clear();
    let mut refused = 0u32;
    for i in 0..1_000_000u32 {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(
            format!("n{i}.test.").parse().unwrap(),
            RecordType::A,
        ));
        rig.ip(&udp((GATEWAY, 53), &message.to_vec().unwrap()));
        for frame in rig.frames() {
            let answer = Message::from_vec(&frame[14 + 28..]).unwrap();
            refused += u32::from(answer.metadata.response_code == ResponseCode::ServFail);
        }
        if i % 1_000 != 999_999 % 1_000 {
            rig.events.clear();
        }
        if i == 100_000 {
            // What was given out first may be given on now.
            rig.wait(Duration::from_secs(120));
        }
    }
    assert!(refused > 800_000, "{refused}");
    // The controlplane makes an event of this count.
    rig.wait(Duration::from_secs(1));
    let told = rig.reports().into_iter().rev().find_map(|report| match report {
        Report::VmStatus(status) => status.counters.get("synthetic_exhausted").copied(),
        _ => None,
    });
    assert_eq!(told, Some(refused.into()));
}

#[test]
fn a_lookup_that_was_asked_about_is_not_counted_a_second_time() {
    let counted = |rig: &mut Rig| -> Vec<u64> {
        let reports = rig.reports().into_iter();
        let counts = reports.filter_map(|report| match report {
            Report::Decided { count, .. } => Some(count),
            _ => None,
        });
        counts.collect()
    };
    for (synthetic_answers, action) in [
        (true, VerdictAction::Allow),
        (false, VerdictAction::Allow),
        (false, VerdictAction::Deny),
    ] {
        let mut rig = Rig::new();
        answer_synthetically(&mut rig, synthetic_answers);
        ask(&mut rig, "one.test.", RecordType::A);
        let miss = rig.misses().remove(0);
        rig.reports();
        rig.order(Order::Verdict(Box::new(lookup_verdict(&miss, action, false))));
        assert!(
            counted(&mut rig).is_empty(),
            "the controlplane counts what it decides"
        );
        ask(&mut rig, "one.test.", RecordType::AAAA);
        assert_eq!(counted(&mut rig), [1], "{action:?}");
        // Two that wait for one verdict: the second is nobody else's to count.
        let mut rig = Rig::new();
        answer_synthetically(&mut rig, synthetic_answers);
        ask(&mut rig, "two.test.", RecordType::A);
        let miss = rig.misses().remove(0);
        ask(&mut rig, "two.test.", RecordType::AAAA);
        rig.reports();
        rig.order(Order::Verdict(Box::new(lookup_verdict(&miss, action, false))));
        assert_eq!(counted(&mut rig), [1], "{action:?}");
    }
}

#[test]
fn an_unreachable_address_passes_the_turn_to_the_next() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "two.test.");
    let lookup = allowed(&mut rig, (address, 443));
    resolved(&mut rig, &lookup, &["203.0.113.80", "203.0.113.81"]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    let (at, first) = rig.only_dial();
    rig.engine
        .handle_refused(rig.now, at, crate::engine::tcp::DialError::HostUnreachable);
    while rig.engine.poll_event().is_some() {}
    rig.sent();
    rig.syn((address, 443));
    let judged = flow_miss(&mut rig);
    assert_ne!(subject(&judged).dialled, first.ip());
    rig.order(once(&judged, VerdictAction::Allow));
    assert_ne!(rig.only_dial().1, first);
}

/// A connection to https of a name, allowed if it says that name, its handshake done; the sequence number that
/// the gateway's side continues with.
fn reading(rig: &mut Rig, address: Ipv4Addr) -> u32 {
    rig.syn((address, 443));
    let miss = flow_miss(rig);
    let mut named = verdict(&miss, VerdictAction::Allow);
    named.name_demand = NameDemand::ByPort;
    named.names = vec!["api.example.test".parse().unwrap()];
    if let Match::Flow(found) = &mut named.found {
        found.names_consulted = true;
    }
    rig.order(Order::Verdict(Box::new(named)));
    let lookup = upstream(rig).remove(0);
    resolved(rig, &lookup, &[REAL]);
    let judged = flow_miss(rig);
    rig.order(once(&judged, VerdictAction::Allow));
    rig.service();
    let (flags, sequence, ..) = rig.only_segment();
    assert_eq!(flags, 0x12, "it is answered to hear its name");
    rig.tcp((address, 443), 0x10, 1001, sequence + 1, &[]);
    rig.service();
    rig.sent();
    sequence + 1
}

fn hello(name: &str) -> Vec<u8> {
    in_records(
        &hello_with(&[server_name_extension(&[(0, name.as_bytes())])]),
        4000,
    )
}

#[test]
fn the_name_that_was_asked_for_must_be_spoken_too() {
    for (spoken, dialled) in [("api.example.test", true), ("other.example.test", false)] {
        let mut rig = synthetic_rig();
        let address = look_up(&mut rig, "api.example.test.");
        let sequence = reading(&mut rig, address);
        assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
        rig.tcp((address, 443), 0x18, 1001, sequence, &hello(spoken));
        rig.service();
        if dialled {
            assert_eq!(rig.only_dial().1, format!("{REAL}:443").parse().unwrap());
        } else {
            assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
            assert_eq!(rig.engine.flow_count(), 0);
        }
    }
}

#[test]
fn what_is_taken_back_while_its_name_is_read_is_not_dialled_on_the_second_judgement_alone() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    let sequence = reading(&mut rig, address);
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    rig.tcp((address, 443), 0x18, 1001, sequence, &hello("api.example.test"));
    rig.service();
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    assert_eq!(rig.misses().len(), 0);
    assert_eq!(rig.only_segment().0 & 4, 4, "it may try anew");
}

// What ends a flow while its name is looked up, and what is left of it then.

fn ended_misses(rig: &mut Rig) -> Vec<vnet_proto::model::MissId> {
    ended(&rig.reports()).into_iter().map(|(miss, _)| miss).collect()
}

fn next_syn(address: Ipv4Addr, port: u16, which: u8) -> Vec<u8> {
    let mut syn = segment((address, port), 2, 5000, 0, &[]);
    syn[21] ^= which;
    syn
}

#[test]
fn a_guest_that_resets_during_the_lookup_leaves_nothing_and_may_try_anew() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    let lookup = allowed(&mut rig, (address, 443));
    rig.tcp((address, 443), 4, 1001, 0, &[]);
    assert_eq!(rig.engine.flow_count(), 0);
    resolved(&mut rig, &lookup, &[REAL]);
    assert!(
        rig.events.iter().all(|e| matches!(e, Event::Report(_))),
        "{:?}",
        rig.events
    );
    assert!(rig.sent().is_empty());
    // What was found serves the next.
    rig.ip(&next_syn(address, 443, 1));
    assert_eq!(upstream(&mut rig), []);
    let judged = flow_miss(&mut rig);
    assert_eq!(subject(&judged).dialled, REAL.parse::<IpAddr>().unwrap());

    // And one that resets while that is judged leaves nothing either.
    let mut reset = next_syn(address, 443, 1);
    reset[33] = 4;
    rig.ip(&reset);
    assert_eq!(ended_misses(&mut rig), [judged.id]);
    rig.order(once(&judged, VerdictAction::Allow));
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_lookup_that_failed_is_made_again_for_the_next_connection() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "flaky.test.");
    let lookup = allowed(&mut rig, (address, 443));
    rig.engine.handle_resolved(rig.now, lookup.0, None);
    rig.service();
    let lookup = upstream(&mut rig).remove(0);
    rig.engine.handle_resolved(rig.now, lookup.0, None);
    assert_eq!(rig.only_icmp(), (3, 1));
    assert_eq!(
        rig.engine.dropped(crate::engine::frame::DropReason::HostRefused),
        1
    );
    rig.syn((address, 443));
    let again = upstream(&mut rig);
    assert_eq!(again.len(), 1);
    resolved(&mut rig, &again[0], &[REAL]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    rig.only_dial();
}

#[test]
fn a_lookup_for_which_no_descriptor_is_left_finds_nothing_and_takes_none() {
    use crate::descriptors::{Descriptors, PER_GUEST, RESERVE_MIN};
    let descriptors = Descriptors::new(RESERVE_MIN + PER_GUEST + 2);
    let mut rig = Rig::with_descriptors(&descriptors);
    answer_synthetically(&mut rig, true);
    let address = look_up(&mut rig, "api.example.test.");
    rig.syn((address, 443));
    let miss = flow_miss(&mut rig);
    rig.answer(&miss, VerdictAction::Allow);
    // The only one is the lookup's for as long as it is asked; another name has to do without.
    let asked: Vec<Event> = std::mem::take(&mut rig.events);
    assert!(asked.iter().any(|e| matches!(e, Event::Resolve { .. })));
    let other = look_up(&mut rig, "other.example.test.");
    rig.ip(&next_syn(other, 443, 1));
    let miss = flow_miss(&mut rig);
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(rig.only_icmp(), (3, 1));
    assert_eq!(upstream(&mut rig), []);
    assert_eq!(rig.engine.counters()["descriptors_refused"], 1);
    // Its end gives it back, and the connection has it.
    rig.events = asked;
    let lookup = upstream(&mut rig).remove(0);
    resolved(&mut rig, &lookup, &[REAL]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    rig.only_dial();
}

#[test]
fn a_yes_that_was_taken_back_is_asked_for_again_for_the_whole_of_a_hold() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    let lookup = allowed(&mut rig, (address, 443));
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    rig.wait(Duration::from_secs(15));
    resolved(&mut rig, &lookup, &[REAL]);
    flow_miss(&mut rig);
    rig.wait(HOLD - Duration::from_millis(1));
    assert!(rig.sent().is_empty(), "a person has the time that is told");
    rig.wait(Duration::from_millis(1));
    assert_eq!(rig.only_segment().0 & 4, 4);
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_yes_for_once_does_not_outlive_the_lease_during_the_lookup() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    // Judged before, so that nobody would be asked again.
    let lookup = allowed(&mut rig, (address, 443));
    resolved(&mut rig, &lookup, &[REAL]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    rig.only_dial();
    rig.order(Order::GuardsChanged);
    rig.wait(Duration::from_secs(400));
    rig.frames();
    rig.reports();

    rig.ip(&next_syn(address, 443, 1));
    let miss = flow_miss(&mut rig);
    rig.order(once(&miss, VerdictAction::Allow));
    let lookup = upstream(&mut rig).remove(0);
    // The session is lost for longer than any lease; the rig's is an hour.
    rig.now += Duration::from_secs(3_600);
    resolved(&mut rig, &lookup, &[REAL]);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    assert_eq!(
        subject(&flow_miss(&mut rig)).dialled,
        IpAddr::from(address),
        "asked anew"
    );
}

/// An allow under a grant with a budget of connections.
fn counted(miss: &Miss) -> Order {
    use vnet_proto::model::{Allowance, Budget};
    let left = Budget {
        connections: 1,
        ..Budget::default()
    };
    Order::Verdict(Box::new(Verdict {
        once: true,
        grant: "g1".into(),
        budget: Some(Allowance {
            left,
            used: Budget::default(),
        }),
        ..verdict(miss, VerdictAction::Allow)
    }))
}

#[test]
fn a_connection_of_a_budget_is_given_back_once_where_nothing_is_dialled() {
    type End = fn(&mut Rig, Ipv4Addr, (u64, String, RecordType));
    let ways: [(&str, End); 5] = [
        ("nothing is found", |rig, _, lookup| {
            resolved(rig, &lookup, &[]);
            let aaaa = upstream(rig).remove(0);
            rig.engine.handle_resolved(rig.now, aaaa.0, None);
        }),
        ("the guest resets", |rig, address, _| {
            rig.tcp((address, 443), 4, 1001, 0, &[])
        }),
        ("the lookup takes too long", |rig, _, _| {
            rig.wait(Duration::from_secs(21))
        }),
        ("what is found is denied", |rig, _, lookup| {
            resolved(rig, &lookup, &[REAL]);
            let judged = flow_miss(rig);
            rig.order(once(&judged, VerdictAction::Deny));
        }),
        ("what is found is dropped", |rig, _, lookup| {
            resolved(rig, &lookup, &[REAL]);
            let judged = flow_miss(rig);
            rig.order(once(&judged, VerdictAction::Drop));
        }),
    ];
    for (way, end) in ways {
        let mut rig = synthetic_rig();
        let address = look_up(&mut rig, "api.example.test.");
        rig.syn((address, 443));
        let miss = flow_miss(&mut rig);
        rig.order(counted(&miss));
        let lookup = upstream(&mut rig).remove(0);
        end(&mut rig, address, lookup);
        while let Some(event) = rig.engine.poll_event() {
            rig.events.push(event);
        }
        let reports = rig.reports();
        let told: Vec<_> = ended(&reports).into_iter().map(|(miss, _)| miss).collect();
        assert_eq!(told, [miss.id], "{way}");
        assert!(
            !reports
                .iter()
                .any(|r| matches!(r, Report::Uses { .. } | Report::FlowOpened(_)))
        );
        assert_eq!(rig.engine.flow_count(), 0, "{way}");
    }

    // Dialled, it is used, and told as that alone.
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    rig.syn((address, 443));
    let miss = flow_miss(&mut rig);
    rig.order(counted(&miss));
    let lookup = upstream(&mut rig).remove(0);
    resolved(&mut rig, &lookup, &[REAL]);
    let judged = flow_miss(&mut rig);
    rig.order(once(&judged, VerdictAction::Allow));
    let reports = rig.reports();
    assert_eq!(ended(&reports), []);
    let opened: Vec<_> = reports
        .iter()
        .filter_map(|r| match r {
            Report::FlowOpened(opened) => Some(opened.miss),
            _ => None,
        })
        .collect();
    assert_eq!(opened, [Some(miss.id)]);
    assert!(reports.iter().any(|r| matches!(r, Report::Uses { .. })));
    rig.only_dial();
}

#[test]
fn a_connection_of_a_budget_that_waited_too_long_to_be_used_is_asked_for_again() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    rig.syn((address, 443));
    let miss = flow_miss(&mut rig);
    rig.order(counted(&miss));
    let lookup = upstream(&mut rig).remove(0);
    resolved(&mut rig, &lookup, &[REAL]);
    // A person is asked about the address, and takes longer than a connection is set aside.
    let judged = flow_miss(&mut rig);
    rig.order(Order::Held {
        miss: judged.id,
        hold: Duration::from_secs(300),
    });
    rig.wait(Duration::from_secs(61));
    rig.order(once(&judged, VerdictAction::Allow));
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    let reports = rig.reports();
    assert_eq!(ended(&reports).len(), 1);
    assert_eq!(
        ended(&reports)[0].0,
        miss.id,
        "given back before it is asked for again"
    );
    let again = reports
        .iter()
        .find_map(|r| match r {
            Report::Miss(miss) => Some(miss.clone()),
            _ => None,
        })
        .expect("asked again");
    rig.order(counted(&again));
    rig.only_dial();
    assert_eq!(upstream(&mut rig), []);
}

#[test]
fn a_client_that_has_said_all_before_the_dial_is_heard_to_its_end() {
    let mut rig = synthetic_rig();
    let address = look_up(&mut rig, "api.example.test.");
    let sequence = reading(&mut rig, address);
    let said = hello("api.example.test");
    rig.tcp((address, 443), 0x19, 1001, sequence, &said);
    rig.service();
    let (at, _) = rig.only_dial();
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let connection = rig.engine.connection(at).unwrap();
    let mut got = Vec::new();
    while connection.has_received() {
        let taken = connection.lend_received(|bytes| {
            got.extend_from_slice(bytes);
            Ok::<_, std::convert::Infallible>(bytes.len())
        });
        assert_ne!(taken, Ok(0));
    }
    assert_eq!(got, said);
    assert!(connection.is_received_whole(), "the half close is passed on");
    // And the other half still goes back.
    connection
        .lend_room(|room| {
            room[..2].copy_from_slice(b"ok");
            Ok::<_, std::convert::Infallible>(2)
        })
        .unwrap();
    rig.sent();
    rig.engine.finish_service(rig.now, at);
    assert_eq!(rig.only_segment().3, b"ok");
}
