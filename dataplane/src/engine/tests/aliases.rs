//! Aliases in upstream answers: asked about before the guest learns anything, remembered, refused, given up.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::{RData, Record, RecordType};
use vnet_proto::model::{LookupMatch, Match, Miss, MissId, Subject, Verdict, VerdictAction};

use super::kit::*;
use crate::engine::Event;
use crate::engine::aliases::WAITING_BYTES_MAX;
use crate::engine::frame::DropReason;
use crate::engine::held::MISSES_MAX;
use crate::message::{DnsDenial, DnsSettings, MissEnd, Order, Report, Settings};

const REAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
const SECOND: Duration = Duration::from_secs(1);

/// A guest whose controlplane judges aliases, and has allowed every lookup.
fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.order(Order::Settings(judging()));
    ask(&mut rig, 1, "first.test");
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(every_lookup(&miss))));
    let first = upstream(&mut rig);
    resolved(&mut rig, first, "first.test", &[]);
    rig.sent();
    rig.reports();
    rig
}

fn judging() -> Settings {
    Settings {
        judges_aliases: true,
        ..settings()
    }
}

fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = id;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(fqdn(name), RecordType::A));
    message.to_vec().unwrap()
}

fn ask(rig: &mut Rig, id: u16, name: &str) {
    rig.ip(&udp((GATEWAY, 53), &query(id, name)));
}

fn fqdn(name: &str) -> hickory_proto::rr::Name {
    format!("{name}.").parse().unwrap()
}

/// Takes the only query that goes upstream.
fn upstream(rig: &mut Rig) -> u64 {
    let at = rig
        .events
        .iter()
        .position(|e| matches!(e, Event::Resolve { .. }))
        .expect("a query goes upstream");
    let Event::Resolve { query, .. } = rig.events.remove(at) else {
        unreachable!()
    };
    query
}

fn answer(name: &str, aliases: &[&str], padding: usize) -> Vec<u8> {
    let mut message = Message::response(0, hickory_proto::op::OpCode::Query);
    message.add_query(Query::query(fqdn(name), RecordType::A));
    let mut owner = name;
    for alias in aliases {
        let data = RData::CNAME(CNAME(fqdn(alias)));
        message.add_answers([Record::from_rdata(fqdn(owner), 300, data)]);
        owner = alias;
    }
    message.add_answers([Record::from_rdata(fqdn(owner), 300, RData::A(REAL.into()))]);
    for n in 0..padding / 16 {
        let address = Ipv4Addr::from(0x0a00_0000 + u32::try_from(n).unwrap());
        message.add_answers([Record::from_rdata(fqdn(owner), 300, RData::A(address.into()))]);
    }
    message.to_vec().unwrap()
}

/// An upstream answers with an address, behind these aliases.
fn resolved(rig: &mut Rig, query: u64, name: &str, aliases: &[&str]) {
    let bytes = answer(name, aliases, 0);
    rig.engine.handle_resolved(rig.now, query, Some(bytes));
    rig.service();
}

fn asked(rig: &mut Rig, id: u16, name: &str, aliases: &[&str]) {
    ask(rig, id, name);
    let query = upstream(rig);
    resolved(rig, query, name, aliases);
}

/// Takes the misses since the last call, all of them about aliases, with these.
fn alias_misses(rig: &mut Rig) -> Vec<(Miss, String)> {
    let about = |miss: Miss| match &miss.subject {
        Subject::Lookup(lookup) if lookup.alias => {
            let name = lookup.name.to_string();
            (miss, name)
        }
        other => panic!("not an alias: {other:?}"),
    };
    rig.misses().into_iter().map(about).collect()
}

fn names(misses: &[(Miss, String)]) -> Vec<&str> {
    misses.iter().map(|(_, name)| name.as_str()).collect()
}

/// Takes the only answer that the guest got.
fn told(rig: &mut Rig) -> Message {
    let (_, payload) = rig.only_datagram();
    Message::from_vec(&payload).unwrap()
}

fn is_told_the_address(rig: &mut Rig) {
    let message = told(rig);
    assert_eq!(message.metadata.response_code, ResponseCode::NoError);
    let last = &message.answers.last().unwrap().data;
    assert!(matches!(last, RData::A(a) if a.0 == REAL), "{last:?}");
}

fn bound(rig: &Rig) -> Vec<String> {
    let names = rig.engine.names_of(rig.now, IpAddr::V4(REAL));
    names
        .iter()
        .map(ToString::to_string)
        .filter(|name| name != "first.test")
        .collect()
}

fn everything(miss: &Miss) -> Verdict {
    Verdict {
        found: Match::Alias(LookupMatch::Any),
        ..verdict(miss, VerdictAction::Allow)
    }
}

#[test]
fn an_answer_waits_until_its_alias_is_allowed_and_the_next_one_asks_nobody() {
    let mut rig = rig();
    asked(&mut rig, 2, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    assert_eq!(names(&misses), ["cdn.test"]);
    assert!(rig.sent().is_empty(), "nothing is told before the verdict");
    assert!(bound(&rig).is_empty(), "and nothing bound");
    rig.answer(&misses[0].0, VerdictAction::Allow);
    is_told_the_address(&mut rig);
    assert_eq!(bound(&rig), ["www.test"]);

    rig.reports();
    asked(&mut rig, 3, "other.test", &["cdn.test"]);
    assert_eq!(alias_misses(&mut rig).len(), 0);
    is_told_the_address(&mut rig);
}

#[test]
fn an_allow_of_an_alias_is_none_of_a_lookup_nor_the_other_way_round() {
    let mut rig = Rig::new();
    rig.order(Order::Settings(judging()));
    ask(&mut rig, 2, "www.test");
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let query = upstream(&mut rig);
    rig.reports();
    resolved(&mut rig, query, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    // Later than its query, and of all aliases.
    rig.wait(5 * SECOND);
    rig.reports();
    rig.order(Order::Verdict(Box::new(everything(&misses[0].0))));
    ask(&mut rig, 3, "cdn.test");
    let lookups = rig.misses();
    assert!(
        matches!(&lookups[..], [Miss { subject: Subject::Lookup(lookup), .. }] if !lookup.alias),
        "{lookups:?}"
    );
    // A verdict on lookups decides no alias.
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH,
    });
    asked_again(&mut rig);
}

/// After a lookup of `www.test` that is allowed with every other, its alias is still asked about.
fn asked_again(rig: &mut Rig) {
    rig.wait(5 * SECOND);
    rig.sent();
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    rig.order(Order::Lease {
        epoch: EPOCH.next(),
        lease: Duration::from_secs(3600),
    });
    rig.reports();
    ask(rig, 9, "www.test");
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(Verdict {
        epoch: EPOCH.next(),
        ..every_lookup(&miss)
    })));
    let query = upstream(rig);
    rig.reports();
    resolved(rig, query, "www.test", &["cdn.test"]);
    let misses = alias_misses(rig);
    assert_eq!(names(&misses), ["cdn.test"]);
    // One that is about lookups does not cover it.
    rig.order(Order::Verdict(Box::new(Verdict {
        epoch: EPOCH.next(),
        ..every_lookup(&misses[0].0)
    })));
    assert!(rig.sent().is_empty());
    rig.order(Order::Verdict(Box::new(Verdict {
        epoch: EPOCH.next(),
        ..everything(&misses[0].0)
    })));
    is_told_the_address(rig);
}

#[test]
fn a_refused_alias_refuses_the_lookup_as_its_name_would_be() {
    for (deny_with, code) in [
        (DnsDenial::Refused, ResponseCode::Refused),
        (DnsDenial::NxDomain, ResponseCode::NXDomain),
    ] {
        let mut rig = rig();
        rig.order(Order::Settings(Settings {
            dns: DnsSettings {
                deny_with,
                ..DnsSettings::default()
            },
            ..judging()
        }));
        asked(&mut rig, 2, "www.test", &["cdn.test", "ads.test"]);
        let misses = alias_misses(&mut rig);
        assert_eq!(names(&misses), ["cdn.test", "ads.test"]);
        rig.answer(&misses[1].0, VerdictAction::Deny);
        let message = told(&mut rig);
        assert_eq!((message.metadata.response_code, message.answers.len()), (code, 0));
        assert!(bound(&rig).is_empty());
        let reports = rig.reports();
        assert_eq!(ended(&reports), [(misses[0].0.id, MissEnd::Covered)]);
        let said = reports.iter().find_map(|report| match report {
            Report::Decided {
                subject: Subject::Lookup(lookup),
                action: VerdictAction::Deny,
                reason,
                ..
            } => Some((lookup.clone(), reason.clone())),
            _ => None,
        });
        let (lookup, reason) = said.expect("a denial is told");
        assert_eq!((lookup.name.as_str(), lookup.alias), ("www.test", false));
        assert_eq!(reason.step, "rule");
        assert_eq!(reason.text, "ads.test, an alias of it, is refused: because");
        assert_eq!(rig.engine.counters()["dns_alias_refused"], 1);

        // It is remembered.
        asked(&mut rig, 3, "www.test", &["cdn.test", "ads.test"]);
        assert_eq!(alias_misses(&mut rig).len(), 0);
        assert_eq!(told(&mut rig).metadata.response_code, code);
    }
}

#[test]
fn a_dropped_alias_is_met_with_silence() {
    let mut rig = rig();
    asked(&mut rig, 2, "www.test", &["ads.test"]);
    let misses = alias_misses(&mut rig);
    rig.answer(&misses[0].0, VerdictAction::Drop);
    rig.wait(20 * SECOND);
    assert!(rig.sent().is_empty() && bound(&rig).is_empty());
}

#[test]
fn what_is_not_decided_in_time_is_refused_and_a_late_verdict_serves_the_next() {
    let mut rig = rig();
    asked(&mut rig, 2, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    rig.wait(4 * SECOND - Duration::from_millis(1));
    assert!(rig.sent().is_empty());
    rig.wait(Duration::from_millis(1));
    assert_eq!(told(&mut rig).metadata.response_code, ResponseCode::ServFail);
    assert_eq!(ended(&rig.reports()), [(misses[0].0.id, MissEnd::HoldExpired)]);
    assert!(bound(&rig).is_empty());
    assert_eq!(rig.engine.aliases.len(), 0);
    assert_eq!(rig.engine.counters()["dns_hold_ended"], 1);

    rig.answer(&misses[0].0, VerdictAction::Allow);
    assert!(rig.sent().is_empty(), "nobody is answered twice");
    asked(&mut rig, 3, "www.test", &["cdn.test"]);
    is_told_the_address(&mut rig);
}

#[test]
fn two_lookups_that_wait_for_one_alias_are_one_question() {
    let mut rig = rig();
    asked(&mut rig, 2, "a.test", &["cdn.test"]);
    asked(&mut rig, 3, "b.test", &["cdn.test", "edge.test"]);
    let misses = alias_misses(&mut rig);
    assert_eq!(names(&misses), ["cdn.test", "edge.test"]);
    rig.answer(&misses[0].0, VerdictAction::Allow);
    is_told_the_address(&mut rig);
    assert_eq!(bound(&rig), ["a.test"]);
    rig.answer(&misses[1].0, VerdictAction::Allow);
    is_told_the_address(&mut rig);
    assert_eq!(bound(&rig).len(), 2);
}

#[test]
fn a_wide_verdict_answers_for_every_alias_that_waits() {
    let mut rig = rig();
    let chain: Vec<String> = (0..8).map(|n| format!("n{n}.test")).collect();
    let chain: Vec<&str> = chain.iter().map(String::as_str).collect();
    asked(&mut rig, 2, "www.test", &chain);
    let misses = alias_misses(&mut rig);
    assert_eq!(names(&misses), chain);
    rig.order(Order::Verdict(Box::new(everything(&misses[3].0))));
    is_told_the_address(&mut rig);
    let mut covered: Vec<MissId> = ended(&rig.reports()).into_iter().map(|(miss, _)| miss).collect();
    covered.sort_unstable();
    let others = misses.iter().enumerate().filter(|(at, _)| *at != 3);
    assert_eq!(covered, others.map(|(_, (miss, _))| miss.id).collect::<Vec<_>>());
    assert_eq!(bound(&rig), ["www.test"]);
}

#[test]
fn a_chain_that_is_too_long_is_refused_and_a_loop_ends() {
    let mut rig = rig();
    asked(&mut rig, 2, "www.test", &["x.test", "www.test"]);
    let misses = alias_misses(&mut rig);
    assert_eq!(names(&misses), ["x.test"]);
    rig.answer(&misses[0].0, VerdictAction::Allow);
    assert_eq!(told(&mut rig).metadata.response_code, ResponseCode::NoError);

    let chain: Vec<String> = (0..17).map(|n| format!("n{n}.test")).collect();
    let chain: Vec<&str> = chain.iter().map(String::as_str).collect();
    rig.reports();
    asked(&mut rig, 3, "long.test", &chain);
    assert_eq!(alias_misses(&mut rig).len(), 0);
    assert_eq!(told(&mut rig).metadata.response_code, ResponseCode::Refused);
    assert_eq!(rig.engine.counters()["dns_alias_limit"], 1);
    asked(&mut rig, 4, "less.test", &chain[..16]);
    assert_eq!(alias_misses(&mut rig).len(), 16);
}

#[test]
fn a_verdict_of_an_epoch_that_is_over_decides_nothing_however_it_came() {
    let mut rig = rig();
    asked(&mut rig, 2, "www.test", &["a.test", "b.test"]);
    let misses = alias_misses(&mut rig);
    rig.answer(&misses[0].0, VerdictAction::Allow);
    rig.next_epoch();
    rig.reports();
    // Too old itself: it is asked again, under its id.
    rig.answer(&misses[1].0, VerdictAction::Allow);
    let again = alias_misses(&mut rig);
    assert_eq!((again[0].0.id, names(&again)), (misses[1].0.id, vec!["b.test"]));
    // And so is what was decided before, once the rest is.
    let of_now = |miss: &Miss, action| {
        Order::Verdict(Box::new(Verdict {
            epoch: EPOCH.next(),
            ..verdict(miss, action)
        }))
    };
    rig.order(of_now(&again[0].0, VerdictAction::Allow));
    assert!(rig.sent().is_empty());
    let again = alias_misses(&mut rig);
    assert_eq!(names(&again), ["a.test"]);
    rig.order(of_now(&again[0].0, VerdictAction::Deny));
    assert_eq!(told(&mut rig).metadata.response_code, ResponseCode::Refused);
    assert!(bound(&rig).is_empty());
}

#[test]
fn a_verdict_for_once_is_for_the_answers_that_wait() {
    let mut rig = rig();
    asked(&mut rig, 2, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    rig.order(Order::Verdict(Box::new(Verdict {
        once: true,
        ..verdict(&misses[0].0, VerdictAction::Allow)
    })));
    is_told_the_address(&mut rig);
    rig.reports();
    asked(&mut rig, 3, "www.test", &["cdn.test"]);
    assert_eq!(names(&alias_misses(&mut rig)), ["cdn.test"]);
}

#[test]
fn a_controlplane_that_judges_no_aliases_is_not_asked() {
    let mut rig = rig();
    rig.order(Order::Settings(settings()));
    asked(&mut rig, 2, "www.test", &["cdn.test"]);
    assert_eq!(alias_misses(&mut rig).len(), 0);
    is_told_the_address(&mut rig);
    assert_eq!(bound(&rig), ["www.test"]);
}

#[test]
fn a_guest_that_hangs_up_leaves_no_question_behind() {
    let mut rig = rig();
    rig.syn((GATEWAY, 53));
    rig.service();
    let (_, sequence, ..) = rig.only_segment();
    rig.tcp((GATEWAY, 53), 0x10, 1001, sequence + 1, &[]);
    let message = query(2, "www.test");
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    let framed = [&length[..], &message].concat();
    rig.tcp((GATEWAY, 53), 0x18, 1001, sequence + 1, &framed);
    rig.service();
    let number = upstream(&mut rig);
    resolved(&mut rig, number, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    assert_eq!(rig.engine.aliases.len(), 1);
    let next = 1001 + u32::try_from(framed.len()).unwrap();
    rig.tcp((GATEWAY, 53), 4, next, 0, &[]);
    rig.service();
    assert_eq!(ended(&rig.reports()), [(misses[0].0.id, MissEnd::GuestGaveUp)]);
    assert_eq!(rig.engine.aliases.len(), 0);
    assert!(bound(&rig).is_empty());
}

#[test]
fn beyond_the_limits_of_bytes_and_misses_answers_are_refused() {
    let mut rig = rig();
    let mut waits = 0;
    let bytes = answer("n0.test", &["cdn.test"], 48 << 10);
    for n in 0..=WAITING_BYTES_MAX / bytes.len() {
        let name = format!("n{n}.test");
        ask(&mut rig, 2, &name);
        let number = upstream(&mut rig);
        let bytes = answer(&name, &["cdn.test"], 48 << 10);
        rig.engine.handle_resolved(rig.now, number, Some(bytes));
        rig.service();
        waits += usize::from(rig.engine.transmit.first_frame().is_none());
    }
    assert_eq!(waits, rig.engine.aliases.len());
    assert!(waits >= 64, "{waits}");
    assert_eq!(told(&mut rig).metadata.response_code, ResponseCode::Refused);
    assert_eq!(rig.engine.counters()["dns_alias_limit"], 1);
    assert_eq!(rig.engine.dropped(DropReason::HeldLimit), 1);
    rig.wait(4 * SECOND);
    assert_eq!(rig.engine.aliases.len(), 0);

    // Every miss that may be open is; the two that found room are not left behind.
    let mut rig = self::rig();
    let name = |n: usize| format!("h{n}.test").parse().unwrap();
    for n in 0..MISSES_MAX - 2 {
        rig.engine.held.join_alias(&name(n), 1).unwrap();
    }
    asked(&mut rig, 3, "www.test", &["a.test", "b.test", "c.test"]);
    assert_eq!(told(&mut rig).metadata.response_code, ResponseCode::Refused);
    let ends = ended(&rig.reports());
    assert_eq!(ends.len(), 2);
    assert!(ends.iter().all(|(_, end)| *end == MissEnd::Evicted));
    assert_eq!(rig.engine.held.len(), MISSES_MAX - 2);
}

/// A guest whose connection waits for its name's lookup, which is upstream.
fn unresolved() -> (Rig, u64) {
    let mut rig = Rig::new();
    rig.order(Order::Settings(Settings {
        synthetic_answers: true,
        ..judging()
    }));
    ask(&mut rig, 2, "www.test");
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let message = told(&mut rig);
    let RData::A(address) = message.answers[0].data else {
        panic!("{message:?}")
    };
    rig.syn((address.0, 443));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let number = upstream(&mut rig);
    rig.reports();
    (rig, number)
}

#[test]
fn a_lookup_of_the_dataplanes_own_is_judged_by_its_aliases_as_well() {
    let (mut rig, number) = unresolved();
    resolved(&mut rig, number, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    assert_eq!(names(&misses), ["cdn.test"]);
    rig.answer(&misses[0].0, VerdictAction::Allow);
    let judged = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(Verdict {
        once: true,
        ..verdict(&judged, VerdictAction::Allow)
    })));
    assert_eq!(rig.only_dial().1.ip(), IpAddr::V4(REAL));

    let (mut rig, number) = unresolved();
    resolved(&mut rig, number, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    rig.answer(&misses[0].0, VerdictAction::Deny);
    assert_eq!(rig.only_segment().0, 0x14, "it is reset");
    let reports = rig.reports();
    assert!(
        reports.iter().any(
            |report| matches!(report, Report::Decided { action: VerdictAction::Deny, reason, .. }
            if reason.text.starts_with("cdn.test, an alias of it"))
        ),
        "{reports:?}"
    );
    assert_eq!(rig.engine.dropped(DropReason::Denied), 1);
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_connection_whose_names_aliases_are_not_decided_in_time_is_refused() {
    let (mut rig, number) = unresolved();
    resolved(&mut rig, number, "www.test", &["cdn.test"]);
    let misses = alias_misses(&mut rig);
    rig.wait(4 * SECOND);
    assert_eq!(rig.only_segment().0, 0x14);
    assert_eq!(ended(&rig.reports()), [(misses[0].0.id, MissEnd::HoldExpired)]);
    assert_eq!((rig.engine.flow_count(), rig.engine.aliases.len()), (0, 0));
}
