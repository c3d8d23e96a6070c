//! What is counted reaches the session with the guest's status.

use std::collections::BTreeMap;
use std::time::Duration;

use vnet_proto::model::{Match, VerdictAction, parse_prefix};

use super::kit::*;
use crate::engine::tally::TARGETS_MAX;
use crate::message::{Order, Report};

/// The counters that were reported last, if any were.
fn reported(rig: &mut Rig) -> Option<BTreeMap<String, u64>> {
    rig.wait(Duration::from_secs(2));
    let reports = rig.reports().into_iter().rev();
    reports
        .filter_map(|r| match r {
            Report::VmStatus(status) => Some(status.counters),
            _ => None,
        })
        .next()
}

fn counts(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
    pairs.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect()
}

#[test]
fn what_the_gateway_and_the_network_count_is_reported_when_it_changes() {
    let mut rig = Rig::new();
    // No query at all, and one of two questions.
    rig.ip(&udp((GATEWAY, 53), &[0; 3]));
    rig.ip(&udp((GATEWAY, 53), &[0, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0]));
    rig.ip(&udp((GATEWAY, 67), NO_ADDRESS));
    let expected = [
        ("dhcp_no_address", 1),
        ("dns_ignored", 1),
        ("dns_malformed", 1),
        ("network_resolver_busy", 3),
    ];
    assert_eq!(reported(&mut rig), Some(counts(&expected)), "none at zero");
    assert_eq!(reported(&mut rig), None, "nothing changed");

    rig.ip(&udp((GATEWAY, 53), &[0; 3]));
    assert_eq!(reported(&mut rig).unwrap()["dns_ignored"], 2);
}

#[test]
fn decisions_beyond_the_limit_of_targets_are_counted_without_a_name() {
    let mut rig = Rig::new();
    rig.syn((SERVER, 1));
    let miss = rig.misses().remove(0);
    let mut all = verdict(&miss, VerdictAction::Deny);
    if let Match::Flow(found) = &mut all.found {
        found.prefix = parse_prefix("203.0.113.0/24").unwrap();
        found.ports = "*".parse().unwrap();
    }
    rig.order(Order::Verdict(Box::new(all)));
    for port in 2..u16::try_from(TARGETS_MAX).unwrap() + 7 {
        rig.syn((SERVER, port));
        rig.frames();
    }
    rig.wait(Duration::from_secs(2));
    let (mut named, mut unnamed) = (0, 0);
    for report in rig.reports() {
        match report {
            Report::Decided { count, .. } => named += count,
            Report::VmStatus(status) => unnamed = status.counters["decisions_unnamed"],
            _ => {}
        }
    }
    assert_eq!((named, unnamed), (TARGETS_MAX as u64, 5));
}
