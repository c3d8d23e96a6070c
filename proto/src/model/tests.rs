//! Behaviour of the model at its edges.

use std::net::SocketAddr;

use super::*;
use crate::v1;

fn key(protocol: Protocol, peer: &str) -> FlowKey {
    let peer: SocketAddr = peer.parse().unwrap();
    let guest = if peer.is_ipv4() {
        "192.168.127.2:40000"
    } else {
        "[fd00::2]:40000"
    };
    FlowKey {
        protocol,
        guest: guest.parse().unwrap(),
        peer,
    }
}

#[test]
fn wildcard_covers_names_below_and_not_the_apex() {
    let pattern: NamePattern = "*.Example.COM.".parse().unwrap();
    for (name, covered) in [
        ("a.example.com", true),
        ("a.b.example.com", true),
        ("example.com", false),
        ("evil-example.com", false),
        ("example.com.evil.test", false),
    ] {
        assert_eq!(pattern.matches(&name.parse().unwrap()), covered, "{name}");
    }
}

#[test]
fn typed_names_become_one_canonical_form_or_are_refused() {
    assert_eq!("EXAMPLE.com.".parse::<Name>().unwrap().as_str(), "example.com");
    assert_eq!(
        "bücher.example".parse::<Name>().unwrap().as_str(),
        "xn--bcher-kva.example"
    );
    for bad in [
        "",
        ".",
        "a..b",
        "a b",
        "10.0.0.1",
        "::1",
        "0x7f.1",
        "2130706433",
        "*.*.a",
        "a\0b",
        "a\\.b",
    ] {
        assert!(bad.parse::<NamePattern>().is_err(), "{bad:?} was taken");
    }
    let long = format!("{}.test", "a".repeat(64));
    assert!(long.parse::<Name>().is_err());
}

#[test]
fn wire_names_keep_odd_bytes_apart() {
    let dotted = Name::from_labels([b"a.b".as_slice(), b"test"].into_iter()).unwrap();
    assert_eq!(dotted.as_str(), "a\\046b.test");
    assert_eq!(Name::from_canonical(dotted.as_str()).unwrap(), dotted);
    assert!(!dotted.is_below(&"b.test".parse().unwrap()));
    assert!(Name::from_canonical("A.test").is_err());
    assert!(Name::from_canonical("a\\04.test").is_err());
}

#[test]
fn prefixes_say_what_they_mean() {
    assert_eq!(parse_prefix("10.0.0.0/8").unwrap().to_string(), "10.0.0.0/8");
    assert_eq!(parse_prefix("192.0.2.7").unwrap().to_string(), "192.0.2.7/32");
    assert_eq!(parse_prefix("fe80::1").unwrap().to_string(), "fe80::1/128");
    for bad in [
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/",
        "010.0.0.1",
        "10.0.0.0/+8",
        "::ffff:10.0.0.1",
        "64:ff9b::10.0.0.0/104",
        "x",
    ] {
        assert!(parse_prefix(bad).is_err(), "{bad} was taken");
    }
}

#[test]
fn ports_parse_strictly() {
    assert_eq!("443".parse::<PortRange>().unwrap(), PortRange::one(443));
    assert_eq!("8000-8999".parse::<PortRange>().unwrap().to_string(), "8000-8999");
    for bad in ["0", "65536", "2-1", "+80", "80-", "-80", "", "http"] {
        assert!(bad.parse::<PortRange>().is_err(), "{bad} was taken");
    }
}

#[test]
fn epochs_of_another_incarnation_never_stand() {
    let one = Epoch {
        incarnation: 1,
        counter: 9,
    };
    assert!(one.stands_under(one));
    assert!(one.next().stands_under(one));
    assert!(!one.stands_under(one.next()));
    assert!(!one.stands_under(Epoch {
        incarnation: 2,
        counter: 1
    }));
}

#[test]
fn flow_match_covers_protocol_prefix_and_ports_only() {
    let found = FlowMatch {
        protocol: Protocol::Tcp,
        prefix: parse_prefix("10.0.0.0/8").unwrap(),
        ports: "80-90".parse().unwrap(),
        names_consulted: false,
    };
    assert!(found.matches(&key(Protocol::Tcp, "10.9.9.9:85")));
    assert!(!found.matches(&key(Protocol::Udp, "10.9.9.9:85")));
    assert!(!found.matches(&key(Protocol::Tcp, "11.9.9.9:85")));
    assert!(!found.matches(&key(Protocol::Tcp, "10.9.9.9:91")));
    assert!(!found.matches(&key(Protocol::Tcp, "[fd00::1]:85")));
}

#[test]
fn subject_survives_the_wire() {
    let subject = FlowSubject {
        key: key(Protocol::Tcp, "192.168.127.254:8080"),
        dialled: "127.0.0.1".parse().unwrap(),
        names: vec!["host.containers.internal".parse().unwrap()],
        guards: [Guard::Host].into_iter().collect(),
        peer_vm: None,
    };
    let miss = Miss {
        id: MissId(7),
        vm: VmId(1),
        subject: Subject::Flow(subject),
        hold: std::time::Duration::from_millis(1500),
        held: 1,
    };
    assert_eq!(Miss::try_from(miss.to_message(None)).unwrap(), miss);
}

#[test]
fn malformed_messages_are_refused_with_their_reason() {
    let good = v1::FlowMatch {
        protocol: v1::Protocol::Tcp.into(),
        prefix: vec![10, 0, 0, 0],
        prefix_length: 8,
        first_port: 1,
        last_port: 65535,
        names_consulted: false,
    };
    assert!(FlowMatch::try_from(good.clone()).is_ok());
    let refused = |change: &dyn Fn(&mut v1::FlowMatch)| {
        let mut message = good.clone();
        change(&mut message);
        FlowMatch::try_from(message).unwrap_err()
    };
    assert!(matches!(refused(&|m| m.protocol = 0), Malformed::Enum { .. }));
    assert!(matches!(refused(&|m| m.protocol = 99), Malformed::Enum { .. }));
    assert!(matches!(
        refused(&|m| m.prefix = vec![1; 5]),
        Malformed::AddressLength { length: 5, .. }
    ));
    assert!(matches!(
        refused(&|m| m.prefix_length = 33),
        Malformed::Prefix { .. }
    ));
    assert!(matches!(
        refused(&|m| m.prefix = vec![10, 0, 0, 1]),
        Malformed::Prefix { .. }
    ));
    assert!(matches!(refused(&|m| m.first_port = 0), Malformed::Ports { .. }));
    assert!(matches!(
        refused(&|m| m.last_port = 65536),
        Malformed::Ports { .. }
    ));
    assert!(matches!(
        refused(&|m| m.protocol = v1::Protocol::Icmp.into()),
        Malformed::Ports { .. }
    ));
    assert!(matches!(
        refused(&|m| m.names_consulted = true),
        Malformed::WideNameMatch { .. }
    ));
    assert!(matches!(
        Verdict::try_from(v1::Verdict::default()),
        Err(Malformed::Enum { .. })
    ));
}

/// A miss of a flow and one of a lookup, and a verdict, as messages that are taken.
fn taken() -> (v1::Miss, v1::Miss, v1::Verdict) {
    let subject = |peer: &str| FlowSubject {
        key: key(Protocol::Tcp, peer),
        dialled: "192.0.2.7".parse().unwrap(),
        names: vec!["a.test".parse().unwrap()],
        guards: GuardSet::EMPTY,
        peer_vm: None,
    };
    let miss = |subject| Miss {
        id: MissId(1),
        vm: VmId(1),
        subject,
        hold: std::time::Duration::from_secs(30),
        held: 1,
    };
    let flow = subject("192.0.2.7:443");
    let verdict = v1::Verdict {
        miss_id: 1,
        action: v1::Action::Allow.into(),
        r#match: Some(v1::verdict::Match::Flow((&FlowMatch::exact(&flow.key)).into())),
        epoch: Some(Epoch::first(1).into()),
        ..Default::default()
    };
    (
        miss(Subject::Flow(flow)).to_message(None),
        miss(Subject::Lookup(LookupSubject::new("a.test".parse().unwrap(), 1))).to_message(None),
        verdict,
    )
}

#[test]
fn each_field_of_a_miss_that_is_wrong_is_named() {
    let (good, lookup, _) = taken();
    assert!(Miss::try_from(good.clone()).is_ok() && Miss::try_from(lookup.clone()).is_ok());
    let flow = |change: &dyn Fn(&mut v1::FlowSubject)| {
        let mut message = good.clone();
        match &mut message.subject {
            Some(v1::miss::Subject::Flow(flow)) => change(flow),
            other => panic!("{other:?}"),
        }
        Miss::try_from(message).unwrap_err().to_string()
    };
    let name = |change: &dyn Fn(&mut v1::LookupSubject)| {
        let mut message = lookup.clone();
        match &mut message.subject {
            Some(v1::miss::Subject::Lookup(lookup)) => change(lookup),
            other => panic!("{other:?}"),
        }
        Miss::try_from(message).unwrap_err().to_string()
    };
    let miss = |change: &dyn Fn(&mut v1::Miss)| {
        let mut message = good.clone();
        change(&mut message);
        Miss::try_from(message).unwrap_err().to_string()
    };
    let wrong = [
        (miss(&|m| m.subject = None), "miss.subject is not set"),
        (miss(&|m| m.hold = None), "miss.hold is not set"),
        (
            miss(&|m| {
                m.hold = Some(prost_types::Duration {
                    seconds: -1,
                    nanos: 0,
                })
            }),
            "miss.hold is 1,",
        ),
        (flow(&|f| f.protocol = 0), "protocol has value 0,"),
        (
            flow(&|f| f.guest_address = vec![1; 3]),
            "flow.guest_address is 3 bytes",
        ),
        (
            flow(&|f| f.guest_address = vec![0xfd; 16]),
            "flow.guest_address is of another",
        ),
        (flow(&|f| f.address = Vec::new()), "flow.address is 0 bytes"),
        (flow(&|f| f.dialled = vec![1; 5]), "flow.dialled is 5 bytes"),
        (
            flow(&|f| f.guest_port = 65_536),
            "flow.guest_port has ports 65536",
        ),
        (flow(&|f| f.port = 65_536), "flow.port has ports 65536"),
        (flow(&|f| f.port = 0), "flow.port has ports 0"),
        (
            flow(&|f| f.protocol = v1::Protocol::Icmp.into()),
            "flow.port has ports 443",
        ),
        (flow(&|f| f.guards = vec![99]), "has value 99,"),
        (
            flow(&|f| f.names = vec!["A.test.".to_owned()]),
            "flow.names is not a canonical",
        ),
        (
            name(&|l| l.name = "-".repeat(64)),
            "lookup.name is not a canonical",
        ),
        (name(&|l| l.query_type = 65_536), "lookup.query_type is 65536,"),
    ];
    for (said, expected) in wrong {
        assert!(said.contains(expected), "{said}, expected {expected}");
    }
}

#[test]
fn each_field_of_a_verdict_that_is_wrong_is_named() {
    let (_, _, good) = taken();
    assert!(Verdict::try_from(good.clone()).is_ok());
    let verdict = |change: &dyn Fn(&mut v1::Verdict)| {
        let mut message = good.clone();
        change(&mut message);
        Verdict::try_from(message).unwrap_err().to_string()
    };
    let names = |kind: v1::lookup_match::Kind, name: &str| {
        Some(v1::verdict::Match::Lookup(v1::LookupMatch {
            kind: kind.into(),
            name: name.to_owned(),
            ..Default::default()
        }))
    };
    use v1::lookup_match::Kind;
    let wrong = [
        (verdict(&|v| v.action = 0), "verdict.action has value 0,"),
        (
            verdict(&|v| v.action = v1::Action::Ask.into()),
            "verdict.action has value",
        ),
        (verdict(&|v| v.r#match = None), "verdict.match is not set"),
        (verdict(&|v| v.epoch = None), "verdict.epoch is not set"),
        (
            verdict(&|v| v.epoch = Some(v1::Epoch::default())),
            "epoch.incarnation is not set",
        ),
        (
            verdict(&|v| {
                v.expires_in = Some(prost_types::Duration {
                    seconds: -2,
                    nanos: 0,
                })
            }),
            "verdict.expires_in is 2,",
        ),
        (
            verdict(&|v| v.name_demand = 99),
            "verdict.name_demand has value 99,",
        ),
        (
            verdict(&|v| v.names = vec!["x..y".to_owned()]),
            "verdict.names is not a canonical",
        ),
        (
            verdict(&|v| v.r#match = names(Kind::Unspecified, "")),
            "match.kind has value 0,",
        ),
        (verdict(&|v| v.r#match = names(Kind::Any, "a.test")), "match.name"),
        (
            verdict(&|v| v.r#match = names(Kind::Exact, "A")),
            "match.name is not a canonical",
        ),
    ];
    for (said, expected) in wrong {
        assert!(said.contains(expected), "{said}, expected {expected}");
    }
}

#[test]
fn a_nat64_destination_is_judged_as_the_ipv4_address_and_keeps_what_is_dialled() {
    let real: std::net::IpAddr = "64:ff9b::a00:1".parse().unwrap();
    let subject = FlowSubject {
        key: FlowKey {
            protocol: Protocol::Icmpv6,
            guest: "[fd00::2]:7".parse().unwrap(),
            peer: std::net::SocketAddr::new(real, 0),
        },
        dialled: real,
        names: Vec::new(),
        guards: GuardSet::EMPTY,
        peer_vm: None,
    };
    let read = FlowSubject::try_from(v1::FlowSubject::from(&subject)).unwrap();
    assert_eq!(read.key.to_string(), "icmp 10.0.0.1");
    assert_eq!((read.key.guest, read.dialled), (subject.key.guest, real));
    let again = FlowSubject::try_from(v1::FlowSubject::from(&read)).unwrap();
    assert_eq!(again, read);

    let found = FlowMatch {
        protocol: Protocol::Icmp,
        prefix: parse_prefix("10.0.0.0/8").unwrap(),
        ports: PortRange::NONE,
        names_consulted: false,
    };
    assert!(found.matches(&subject.key));
    let everything = FlowMatch {
        protocol: Protocol::Icmpv6,
        prefix: parse_prefix("::/0").unwrap(),
        ..found
    };
    assert!(
        !everything.matches(&subject.key),
        "an IPv6 rule does not reach it"
    );
    assert_eq!(Target::of_flow(&subject.key).to_string(), "icmp 10.0.0.1");
}

#[test]
fn whatever_bytes_a_guest_asks_for_a_name_is_printable_ascii() {
    for byte in 0..=u8::MAX {
        for label in [vec![byte], vec![b'x', byte, b'y'], vec![byte; 63]] {
            let Ok(name) = Name::from_labels([label.as_slice(), b"test"].into_iter()) else {
                continue;
            };
            let text = name.as_str();
            assert!(text.bytes().all(|b| b.is_ascii_graphic()), "{byte}: {text:?}");
            assert_eq!(Name::from_canonical(text).unwrap(), name);
        }
    }
    // Look-alikes have one form, which looks like nothing else.
    let alike: Name = "\u{430}pple.com".parse().unwrap();
    assert_eq!(alike.as_str(), "xn--pple-43d.com");
}
