//! Verdicts, epochs, cuts and leases.

use std::net::Ipv4Addr;
use std::time::Duration;

use vnet_proto::model::{CommandId, Epoch, Match, Subject, VerdictAction, parse_prefix};

use super::kit::*;
use crate::engine::Event;
use crate::engine::tcp::DialError;
use crate::message::{FlowEnd, MissEnd, Order, Report};

const WEB: (std::net::Ipv4Addr, u16) = (SERVER, 80);

#[test]
fn an_older_verdict_is_refused_and_the_question_asked_again() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    rig.answer(&miss, VerdictAction::Allow);
    let again = rig.misses();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].id, miss.id);
    let mut fresh = verdict(&miss, VerdictAction::Allow);
    fresh.epoch = EPOCH.next();
    rig.order(Order::Verdict(Box::new(fresh)));
    rig.only_dial();
}

#[test]
fn before_any_epoch_nothing_opens() {
    let mut rig = Rig::new();
    rig.order(Order::Revoke {
        command: None,
        epoch: Epoch {
            incarnation: 8,
            counter: 1,
        },
    });
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
}

#[test]
fn a_verdict_that_does_not_cover_its_miss_decides_nothing() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    let mut other = verdict(&miss, VerdictAction::Allow);
    if let Match::Flow(found) = &mut other.found {
        found.prefix = parse_prefix("198.51.100.0/24").unwrap();
    }
    rig.order(Order::Verdict(Box::new(other)));
    assert!(rig.events.is_empty());
}

#[test]
fn a_wide_verdict_answers_everything_that_waits_inside_it() {
    let mut rig = Rig::new();
    for port in 80..90 {
        rig.syn((SERVER, port));
    }
    let misses = rig.misses();
    let mut wide = verdict(&misses[0], VerdictAction::Deny);
    if let Match::Flow(found) = &mut wide.found {
        found.prefix = parse_prefix("203.0.113.0/24").unwrap();
        found.ports = "80-84".parse().unwrap();
    }
    rig.order(Order::Verdict(Box::new(wide)));
    assert_eq!(rig.sent().len(), 5);
    let covered = ended(&rig.reports());
    assert_eq!(covered.len(), 4);
    assert!(covered.iter().all(|(_, end)| *end == MissEnd::Covered));
    assert_eq!(rig.engine.flow_count(), 5);
}

#[test]
fn once_lets_one_flow_through_and_the_next_asks() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let mut second = segment(WEB, 2, 5000, 0, &[]);
    second[21] ^= 1;
    rig.ip(&second);
    let misses = rig.misses();
    assert_eq!(misses.len(), 2, "one miss, told again that two wait");
    assert_eq!(misses[0].id, misses[1].id);
    let mut once = verdict(&misses[0], VerdictAction::Allow);
    once.once = true;
    rig.order(Order::Verdict(Box::new(once)));
    let again = rig.misses();
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].id, misses[0].id);
    rig.only_dial();
}

#[test]
fn a_cut_resets_both_sides_and_says_how_many() {
    let mut rig = Rig::new();
    let (at, _) = rig.connect(WEB);
    let id = rig.engine.flow(at).unwrap().id;
    rig.reports();
    rig.order(Order::Cut {
        command: CommandId(5),
        flows: vec![id, vnet_proto::model::FlowId(1)],
    });
    assert_eq!(rig.only_segment().0 & 4, 4);
    assert!(
        rig.events
            .iter()
            .any(|e| matches!(e, Event::Close { reset: true, .. }))
    );
    let reports = rig.reports();
    assert!(reports.iter().any(|r| matches!(
        r,
        Report::Done {
            command: CommandId(5),
            cut: 1,
            ..
        }
    )));
    assert!(reports.iter().any(|r| matches!(
        r,
        Report::FlowClosed {
            end: FlowEnd::Cut,
            ..
        }
    )));
}

#[test]
fn a_revocation_empties_the_cache_and_is_acknowledged() {
    let mut rig = Rig::new();
    rig.connect(WEB);
    rig.reports();
    rig.order(Order::Revoke {
        command: Some(CommandId(3)),
        epoch: EPOCH.next(),
    });
    assert!(rig.reports().iter().any(|r| matches!(
        r,
        Report::Done {
            command: CommandId(3),
            ..
        }
    )));
    let mut second = segment(WEB, 2, 5000, 0, &[]);
    second[21] ^= 1;
    rig.ip(&second);
    assert_eq!(rig.misses().len(), 1);
}

#[test]
fn what_rests_on_a_grant_ends_with_it_without_anybody_asking() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    let mut timed = verdict(&miss, VerdictAction::Allow);
    timed.expires_in = Some(Duration::from_secs(5));
    timed.grant = "g1".into();
    rig.order(Order::Verdict(Box::new(timed)));
    let (at, _) = rig.only_dial();
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let (_, sequence, ..) = rig.only_segment();
    rig.tcp(WEB, 0x10, 1001, sequence + 1, &[]);
    rig.wait(Duration::from_millis(4_999));
    rig.sent();
    rig.reports();
    rig.wait(Duration::from_millis(1));
    assert_eq!(rig.only_segment().0 & 4, 4);
    assert!(rig.reports().iter().any(|r| matches!(
        r,
        Report::FlowClosed {
            end: FlowEnd::GrantEnded,
            ..
        }
    )));
}

#[test]
fn an_established_flow_and_a_hit_ask_nothing() {
    let mut rig = Rig::new();
    let (at, sequence) = rig.connect(WEB);
    rig.reports();
    for i in 0..100u32 {
        rig.tcp(WEB, 0x18, 1001 + i * 5, sequence, b"hello");
        rig.engine
            .connection(at)
            .unwrap()
            .lend_received(|b| Ok::<_, std::convert::Infallible>(b.len()))
            .unwrap();
        rig.service();
    }
    let mut second = segment(WEB, 2, 5000, 0, &[]);
    second[21] ^= 1;
    rig.ip(&second);
    rig.only_dial();
    assert!(rig.reports().iter().all(|r| !matches!(r, Report::Miss(_))));
}

#[test]
fn refusals_of_the_cache_are_counted_and_reported_once_a_second() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Deny);
    rig.reports();
    let counts = |rig: &mut Rig| -> Vec<u64> {
        let reports = rig.reports().into_iter();
        let count = |r| match r {
            Report::Decided {
                count,
                subject: Subject::Flow(_),
                ..
            } => Some(count),
            _ => None,
        };
        reports.filter_map(count).collect()
    };
    for _ in 0..10 {
        rig.syn(WEB);
    }
    assert!(rig.reports().is_empty());
    rig.wait(Duration::from_secs(1));
    assert_eq!(counts(&mut rig), [10]);

    // What was refused in a guest's last second is told too.
    for _ in 0..3 {
        rig.syn(WEB);
    }
    rig.engine.handle_link_down();
    rig.wait(Duration::ZERO);
    assert_eq!(counts(&mut rig), [3]);
}

#[test]
fn after_one_miss_a_scan_of_what_it_opened_asks_nothing_more() {
    let mut rig = Rig::new();
    rig.syn((Ipv4Addr::new(198, 18, 0, 1), 443));
    let miss = rig.misses().remove(0);
    let mut wide = verdict(&miss, VerdictAction::Allow);
    wide.found = vnet_proto::model::Match::Flow(vnet_proto::model::FlowMatch {
        protocol: vnet_proto::model::Protocol::Tcp,
        prefix: "198.18.0.0/16".parse().unwrap(),
        ports: vnet_proto::model::PortRange::one(443),
        names_consulted: false,
    });
    rig.order(Order::Verdict(Box::new(wide)));
    let (at, _) = rig.only_dial();
    rig.engine.handle_refused(rig.now, at, DialError::Refused);
    rig.reports();
    for host in 0..=u16::MAX {
        let [high, low] = host.to_be_bytes();
        let address = Ipv4Addr::new(198, 18, high, low);
        rig.syn((address, 443));
        assert_eq!(rig.misses().len(), 0, "{address} was asked for");
        let (at, to) = rig.only_dial();
        assert_eq!(to.ip(), address);
        rig.engine.handle_refused(rig.now, at, DialError::Refused);
        rig.events.clear();
        rig.sent();
    }
    // Beside it, everything is: another port, another network.
    rig.syn((Ipv4Addr::new(198, 18, 0, 1), 444));
    rig.syn((Ipv4Addr::new(198, 19, 0, 1), 443));
    assert_eq!(rig.misses().len(), 2);
}

#[test]
fn what_is_cached_is_told_with_what_it_stands_for() {
    let mut rig = Rig::new();
    rig.connect(WEB);
    rig.reports();
    rig.order(Order::ReportVerdicts {
        command: CommandId(8),
    });
    let told = rig.reports().into_iter().find_map(|report| match report {
        Report::Verdicts {
            command: CommandId(8),
            verdicts,
            in_all,
            ..
        } => Some((verdicts, in_all)),
        _ => None,
    });
    let (verdicts, in_all) = told.expect("it is told");
    assert_eq!((verdicts.len(), in_all), (1, 1));
    assert_eq!(
        (verdicts[0].action, verdicts[0].epoch),
        (VerdictAction::Allow, EPOCH)
    );
    assert_eq!(verdicts[0].found.to_string(), format!("tcp {}:{}", WEB.0, WEB.1));
}
