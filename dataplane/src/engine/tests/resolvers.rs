//! DNS to other servers where the policy says that it is answered by the gateway, what a policy's limits
//! report, and verdicts that outlive their lease.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use smoltcp::wire::Ipv4Packet;
use vnet_proto::model::{Subject, Verdict, VerdictAction};

use super::kit::*;
use crate::engine::Event;
use crate::message::{DnsSettings, Order, Report, Settings};

const OTHER: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);

fn treat(rig: &mut Rig, dns: DnsSettings, loss_grace: Duration) {
    rig.order(Order::Settings(Settings {
        dns,
        loss_grace,
        ..settings()
    }));
}

fn redirecting() -> DnsSettings {
    DnsSettings {
        redirect: true,
        ..DnsSettings::default()
    }
}

/// A query for `name` of type TXT.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.extend_from_slice(&[0, 0, 16, 0, 1]);
    bytes
}

fn upstream(rig: &mut Rig) -> Vec<u64> {
    let resolve = |e: &Event| matches!(e, Event::Resolve { .. });
    let found: Vec<_> = rig.events.extract_if(.., |e| resolve(e)).collect();
    found
        .into_iter()
        .filter_map(|e| match e {
            Event::Resolve { query, .. } => Some(query),
            _ => None,
        })
        .collect()
}

fn allow_lookups(rig: &mut Rig) {
    let miss = rig.misses().remove(0);
    assert!(matches!(miss.subject, Subject::Lookup(_)));
    rig.order(Order::Verdict(Box::new(every_lookup(&miss))));
}

#[test]
fn queries_to_any_other_server_are_answered_by_the_gateway_in_that_servers_name() {
    let mut rig = Rig::new();
    treat(&mut rig, redirecting(), Duration::ZERO);
    for server in [OTHER, ALIAS] {
        rig.ip(&udp((server, 53), &query(7, "a.test")));
        if server == OTHER {
            allow_lookups(&mut rig);
        }
        let asked = upstream(&mut rig);
        assert_eq!(asked.len(), 1, "asked for like any other name");
        rig.engine.handle_resolved(rig.now, asked[0], None);
        let sent = rig.sent();
        let ip = Ipv4Packet::new_checked(&sent[0][..]).unwrap();
        assert_eq!((ip.src_addr(), &ip.payload()[..2]), (server, &[0, 53][..]));
        assert_eq!(ip.payload()[8..10], [0, 7]);
    }
    assert!(rig.misses().is_empty(), "no flow is asked about");
    assert_eq!(rig.engine.flow_count(), 0);
    rig.wait(Duration::from_secs(1));
    let counted = rig.reports().into_iter().find_map(|r| match r {
        Report::VmStatus(status) => status.counters.get("dns_redirected").copied(),
        _ => None,
    });
    assert_eq!(counted, Some(2));
}

#[test]
fn dns_connections_to_any_other_server_end_at_the_gateway() {
    let mut rig = Rig::new();
    treat(&mut rig, redirecting(), Duration::ZERO);
    rig.syn((OTHER, 53));
    rig.service();
    let (flags, _, acknowledgement, _) = rig.only_segment();
    assert_eq!((flags, acknowledgement), (0x12, 1001), "answered here");
    assert!(rig.misses().is_empty() && rig.events.iter().all(|e| !matches!(e, Event::Dial { .. })));
}

#[test]
fn nothing_but_port_53_of_what_is_no_guest_is_redirected() {
    let mut rig = Rig::new();
    treat(&mut rig, redirecting(), Duration::ZERO);
    let neighbour = Ipv4Addr::new(192, 168, 127, 3);
    *rig.surroundings.neighbour.lock().unwrap() = Some(neighbour);
    for (peer, port) in [(OTHER, 5353), (OTHER, 853), (neighbour, 53)] {
        rig.ip(&udp((peer, port), &query(7, "a.test")));
        let misses = rig.misses();
        assert_eq!(misses.len(), 1, "{peer}:{port}");
        let Subject::Flow(flow) = &misses[0].subject else {
            panic!("not a flow")
        };
        assert_eq!(flow.key.peer.ip(), IpAddr::V4(peer));
    }
    rig.ip(&udp((Ipv4Addr::new(224, 0, 0, 251), 53), &query(7, "a.test")));
    assert!(
        rig.misses().is_empty() && rig.sent().is_empty(),
        "nowhere that anything may go"
    );
}

#[test]
fn without_a_redirect_dns_to_another_server_is_a_flow_to_be_judged() {
    let mut rig = Rig::new();
    rig.ip(&udp((OTHER, 53), &query(7, "a.test")));
    rig.syn((OTHER, 53));
    assert_eq!(rig.misses().len(), 2);
    assert!(upstream(&mut rig).is_empty());
}

#[test]
fn a_limit_that_refuses_lookups_is_reported_once_a_second_with_its_count() {
    let mut rig = Rig::new();
    let limited = DnsSettings {
        names_per_domain: 20,
        ..DnsSettings::default()
    };
    treat(&mut rig, limited, Duration::ZERO);
    rig.ip(&udp((GATEWAY, 53), &query(0, "x0.example.com")));
    allow_lookups(&mut rig);
    for n in 1..1_000 {
        rig.ip(&udp((GATEWAY, 53), &query(n, &format!("x{n}.example.com"))));
    }
    assert_eq!(
        upstream(&mut rig).len(),
        20,
        "the verdict is cached, and the limit holds all the same"
    );
    rig.wait(Duration::from_secs(2));
    let reached: Vec<_> = rig
        .reports()
        .into_iter()
        .filter_map(|r| match r {
            Report::LimitReached {
                limit,
                subject,
                value,
                count,
                ..
            } => Some((limit, subject, value, count)),
            _ => None,
        })
        .collect();
    let domain = "example.com".to_owned();
    assert_eq!(reached, [("dns.limits.namesPerDomain", domain, 20, 980)]);
}

#[test]
fn what_the_file_allows_outlives_the_lease_as_long_as_the_policy_says_and_grants_do_not() {
    let mut rig = Rig::new();
    treat(&mut rig, DnsSettings::default(), Duration::from_secs(600));
    let granted = (SERVER, 8080);
    rig.syn((SERVER, 80));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    rig.syn(granted);
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(Verdict {
        grant: "g".to_owned(),
        ..verdict(&miss, VerdictAction::Allow)
    })));
    let asks = |rig: &mut Rig, peer: (Ipv4Addr, u16), from: u16| {
        rig.reports();
        let mut packet = segment(peer, 2, 1, 0, &[]);
        packet[20..22].copy_from_slice(&from.to_be_bytes());
        rig.ip(&packet);
        !rig.misses().is_empty()
    };
    // The rig's lease is an hour.
    rig.wait(Duration::from_secs(3_500));
    assert!(!asks(&mut rig, (SERVER, 80), 1) && !asks(&mut rig, granted, 1));
    rig.wait(Duration::from_secs(200));
    assert!(!asks(&mut rig, (SERVER, 80), 2), "the file's");
    assert!(asks(&mut rig, granted, 2), "a grant's ends with its lease");
    rig.wait(Duration::from_secs(600));
    assert!(asks(&mut rig, (SERVER, 80), 3), "no longer than that");
}
