//! Local zones: what is answered, in which order, and what is refused.

use hickory_proto::op::{Message, Query};

use std::net::Ipv4Addr;

use super::*;
use crate::engine::gateway::dns::message::read_query;

fn ask(zones: &Zones, name: &str, kind: RecordType) -> Option<Message> {
    let mut query = Message::query();
    query.add_query(Query::query(WireName::from_ascii(name).unwrap(), kind));
    let question = read_query(&query.to_vec().unwrap()).unwrap();
    let answer = Message::from_vec(&zones.answer(&question)?).unwrap();
    assert!(answer.metadata.authoritative);
    assert_eq!(answer.queries, query.queries);
    Some(answer)
}

fn default() -> Zones {
    default_zones(
        Ipv4Addr::new(192, 168, 127, 1),
        Some(Ipv4Addr::new(192, 168, 127, 254)),
    )
}

fn data(message: &Message) -> Vec<String> {
    message.answers.iter().map(|r| r.data.to_string()).collect()
}

/// A record's name is a pattern where it stands between slashes.
fn zone(name: Option<&str>, records: &[(&str, &str)], default: Option<&str>) -> Zone {
    let records: Vec<[&str; 3]> = records
        .iter()
        .map(
            |&(owner, address)| match owner.strip_prefix('/').and_then(|o| o.strip_suffix('/')) {
                Some(pattern) => ["", pattern, address],
                None => [owner, "", address],
            },
        )
        .collect();
    Zone::read(
        name.unwrap_or("."),
        records.into_iter(),
        default.unwrap_or_default(),
    )
    .unwrap()
}

#[test]
fn a_record_without_an_address_is_looked_up_upstream_and_the_rest_of_its_zone_is_not() {
    let mut zones = Zones::new();
    zones
        .set(zone(None, &[("api.example.com", ""), ("db", "10.0.0.1")], None))
        .unwrap();
    assert!(ask(&zones, "API.example.com.", RecordType::A).is_none());
    assert!(
        ask(&zones, "api.example.com.", RecordType::TXT).is_none(),
        "whatever the type"
    );
    for name in ["www.example.com.", "x.api.example.com.", "evil.test."] {
        let answer = ask(&zones, name, RecordType::A).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name}");
    }
    assert_eq!(data(&ask(&zones, "db.", RecordType::A).unwrap()), ["10.0.0.1"]);
    // Which of two records is the first decides.
    let both = [("api.example.com", ""), ("api.example.com", "10.0.0.2")];
    zones.set(zone(None, &both, None)).unwrap();
    assert!(ask(&zones, "api.example.com.", RecordType::A).is_none());
    let both = [("api.example.com", "10.0.0.2"), ("api.example.com", "")];
    zones.set(zone(None, &both, None)).unwrap();
    assert_eq!(
        data(&ask(&zones, "api.example.com.", RecordType::A).unwrap()),
        ["10.0.0.2"]
    );
}

#[test]
fn names_of_a_zone_are_answered_in_any_case() {
    let answer = ask(&default(), "HOST.Containers.Internal.", RecordType::A).unwrap();
    assert_eq!(data(&answer), ["192.168.127.254"]);
    assert_eq!(
        answer.answers[0].name.to_ascii(),
        "HOST.Containers.Internal.",
        "in the case it was asked in"
    );
    let answer = ask(&default(), "gateway.docker.internal.", RecordType::ANY).unwrap();
    assert_eq!(data(&answer), ["192.168.127.1"]);
}

#[test]
fn other_types_are_nodata_and_other_names_nxdomain_with_a_soa() {
    for (name, kind, code) in [
        (
            "host.containers.internal.",
            RecordType::AAAA,
            ResponseCode::NoError,
        ),
        (
            "host.containers.internal.",
            RecordType::HTTPS,
            ResponseCode::NoError,
        ),
        ("containers.internal.", RecordType::A, ResponseCode::NoError),
        (
            "nobody.containers.internal.",
            RecordType::A,
            ResponseCode::NXDomain,
        ),
        (
            "a.host.containers.internal.",
            RecordType::A,
            ResponseCode::NXDomain,
        ),
    ] {
        let answer = ask(&default(), name, kind).unwrap();
        assert_eq!(
            (answer.metadata.response_code, answer.answers.len()),
            (code, 0),
            "{name} {kind}"
        );
        assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
        assert_eq!(answer.authorities[0].name.to_ascii(), "containers.internal.");
    }
}

#[test]
fn names_outside_are_not_answered() {
    for name in ["example.com.", "internal.", "xcontainers.internal.", "."] {
        assert!(ask(&default(), name, RecordType::A).is_none(), "{name}");
    }
}

#[test]
fn a_default_address_stands_for_every_other_name() {
    let mut zones = Zones::new();
    zones
        .set(zone(
            Some("apps.test"),
            &[("six", "2001:db8::6")],
            Some("192.168.127.254"),
        ))
        .unwrap();
    for name in ["any.apps.test.", "a.b.apps.test.", "apps.test."] {
        assert_eq!(
            data(&ask(&zones, name, RecordType::A).unwrap()),
            ["192.168.127.254"],
            "{name}"
        );
    }
    let six = ask(&zones, "six.apps.test.", RecordType::A).unwrap();
    assert_eq!(
        (six.metadata.response_code, six.answers.len()),
        (ResponseCode::NoError, 0),
        "a record is not defaulted"
    );
    assert_eq!(
        data(&ask(&zones, "six.apps.test.", RecordType::AAAA).unwrap()),
        ["2001:db8::6"]
    );
}

#[test]
fn the_apex_has_its_records_and_names_between_exist() {
    let mut zones = Zones::new();
    zones
        .set(zone(
            Some("my.test"),
            &[("", "10.0.0.1"), ("a.b", "10.0.0.2"), ("a.b", "10.0.0.3")],
            None,
        ))
        .unwrap();
    assert_eq!(
        data(&ask(&zones, "my.test.", RecordType::A).unwrap()),
        ["10.0.0.1"]
    );
    assert_eq!(ask(&zones, "my.test.", RecordType::SOA).unwrap().answers.len(), 1);
    assert_eq!(
        data(&ask(&zones, "my.test.", RecordType::NS).unwrap()),
        ["my.test."]
    );
    assert_eq!(
        ask(&zones, "b.my.test.", RecordType::A)
            .unwrap()
            .metadata
            .response_code,
        ResponseCode::NoError
    );
    assert_eq!(
        data(&ask(&zones, "a.b.my.test.", RecordType::A).unwrap()),
        ["10.0.0.2"],
        "the first of two records"
    );
}

#[test]
fn the_first_zone_that_a_name_is_in_answers_be_there_a_longer_one_behind_it() {
    let mut zones = Zones::new();
    zones.set(zone(Some("test"), &[], Some("10.0.0.1"))).unwrap();
    zones.set(zone(Some("a.test"), &[], Some("10.0.0.2"))).unwrap();
    zones.set(zone(None, &[], Some("10.9.9.9"))).unwrap();
    zones.set(zone(Some("late"), &[], Some("10.0.0.3"))).unwrap();
    for (name, address) in [
        ("x.a.test.", "10.0.0.1"),
        ("a.test.", "10.0.0.1"),
        ("example.com.", "10.9.9.9"),
        ("x.late.", "10.9.9.9"),
    ] {
        assert_eq!(
            data(&ask(&zones, name, RecordType::A).unwrap()),
            [address],
            "{name}"
        );
    }
    // Replaced, it keeps its place.
    zones.set(zone(Some("test"), &[], None)).unwrap();
    let answer = ask(&zones, "x.a.test.", RecordType::A).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

#[test]
fn patterns_and_names_are_tried_in_order_and_the_first_answers() {
    let mut zones = Zones::new();
    let records = [
        ("app-1", "10.0.0.1"),
        ("/^APP-[0-9]+$/", "10.0.0.2"),
        ("app-2", "10.0.0.3"),
        ("/pass/", ""),
        ("/six/", "fd00::6"),
        ("/six/", "10.0.0.6"),
        ("/./", "10.0.0.9"),
    ];
    zones.set(zone(Some("crc.test"), &records, None)).unwrap();
    for (name, address) in [
        ("app-1.crc.test.", "10.0.0.1"),
        ("App-2.CRC.test.", "10.0.0.2"),
        ("x.app-2.crc.test.", "10.0.0.9"),
        ("a.SIX.b.crc.test.", "10.0.0.6"),
    ] {
        assert_eq!(
            data(&ask(&zones, name, RecordType::A).unwrap()),
            [address],
            "{name}"
        );
    }
    assert_eq!(
        data(&ask(&zones, "six.crc.test.", RecordType::AAAA).unwrap()),
        ["fd00::6"]
    );
    assert_eq!(
        ask(&zones, "app-2.crc.test.", RecordType::AAAA)
            .unwrap()
            .answers
            .len(),
        0,
        "of the other family only what is for the very same answers"
    );
    for kind in [RecordType::A, RecordType::TXT] {
        assert!(ask(&zones, "bypass.crc.test.", kind).is_none(), "{kind}");
    }
    // A pattern sees nothing of the zone's own name.
    zones
        .set(zone(Some("crc.test"), &[("/crc|test/", "10.0.0.1")], None))
        .unwrap();
    let answer = ask(&zones, "x.crc.test.", RecordType::A).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

#[test]
fn reverse_lookups_find_local_records_only() {
    let answer = ask(&default(), "254.127.168.192.in-addr.arpa.", RecordType::PTR).unwrap();
    assert_eq!(data(&answer), ["host.containers.internal."]);
    assert!(ask(&default(), "9.127.168.192.in-addr.arpa.", RecordType::PTR).is_none());
    assert!(ask(&default(), "127.168.192.in-addr.arpa.", RecordType::PTR).is_none());
    // An address whose name has another now is no longer its.
    let mut zones = default();
    for name in ["containers.internal", "docker.internal"] {
        zones
            .merge(zone(Some(name), &[("host", "10.0.0.9")], None))
            .unwrap();
    }
    assert!(ask(&zones, "254.127.168.192.in-addr.arpa.", RecordType::PTR).is_none());
    let answer = ask(&zones, "9.0.0.10.in-addr.arpa.", RecordType::PTR).unwrap();
    assert_eq!(data(&answer), ["host.containers.internal."]);
}

/// Where each record is compared with each, 64 times as many take thousands of times as long.
#[test]
fn adding_and_removing_many_records_takes_as_long_as_they_are_many() {
    let records = |what: &str, count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("{what}{n:05}")).collect();
        let records: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "10.0.0.1")).collect();
        zone(Some("a.test"), &records, None)
    };
    let takes = |count: usize| {
        let [there, more] = ["old", "new"].map(|what| records(what, count));
        let run = |_| {
            let mut zones = Zones::new();
            zones.set(there.clone()).unwrap();
            let more = more.clone();
            let began = std::time::Instant::now();
            let merged = zones.merge(more).unwrap();
            zones.remove_records(there.name.as_ref(), &there.records).unwrap();
            let took = began.elapsed();
            assert_eq!(merged.records.len(), 2 * count);
            assert_eq!(zones.list()[0].records.len(), count);
            took
        };
        (0..7).map(run).min().unwrap()
    };
    let (few, many) = (takes(ZONE_RECORDS_MAX / 128), takes(ZONE_RECORDS_MAX / 2));
    assert!(many < 1_000 * few, "{many:?}, and a 64th of it {few:?}");
}

#[test]
fn setting_replaces_merging_prepends_removing_removes() {
    let docker: Name = "docker.internal".parse().unwrap();
    let names = |zones: &Zones| -> Vec<String> { zones.list().iter().map(|z| z.text().to_owned()).collect() };
    let mut zones = default();
    zones.set(zone(Some("more.test"), &[], None)).unwrap();
    let known = zones.list()[1].records.clone();
    let added = zone(
        Some("Docker.Internal."),
        &[("host", "10.0.0.9"), ("/x/", "")],
        Some("10.0.0.1"),
    );
    let merged = zones.merge(added.clone()).unwrap();
    assert_eq!(merged.records, [&added.records[..], &known].concat());
    assert_eq!(
        names(&zones),
        ["containers.internal", "docker.internal", "more.test"],
        "in its place"
    );
    for (name, address) in [
        ("host", "10.0.0.9"),
        ("gateway", "192.168.127.1"),
        ("other", "10.0.0.1"),
    ] {
        let answer = ask(&zones, &format!("{name}.docker.internal."), RecordType::A).unwrap();
        assert_eq!(data(&answer), [address]);
    }
    // The same again adds nothing, and a default address ends by one that is none.
    let again = zone(Some("docker.internal"), &[("host", "10.0.0.9")], None);
    let again = zones.merge(again).unwrap();
    assert_eq!((again.records, again.default_address), (merged.records, None));
    // A zone that is not there comes last.
    zones
        .merge(zone(Some("last.test"), &[("a", "10.0.0.1")], None))
        .unwrap();
    assert_eq!(names(&zones)[3], "last.test");

    // Of two records of one name the one with the address goes, and without one both do.
    let record = |name: &str, address: &str| zone(None, &[(name, address)], None).records;
    let left = zones
        .remove_records(Some(&docker), &record("host", "10.0.0.9"))
        .unwrap();
    assert_eq!(left.records.len(), 3);
    let answer = ask(&zones, "host.docker.internal.", RecordType::A).unwrap();
    assert_eq!(data(&answer), ["192.168.127.254"]);
    let left = zones.remove_records(Some(&docker), &record("host", "")).unwrap();
    assert_eq!(left.records.len(), 2);
    assert!(
        zones
            .remove_records(Some(&docker), &record("/x/", "10.0.0.9"))
            .is_err()
    );
    zones.remove_records(Some(&docker), &record("/x/", "")).unwrap();
    assert_eq!(
        zones.remove_records(Some(&docker), &record("host", "")),
        Err(ZoneError::NoRecord("docker.internal".to_owned()))
    );
    assert_eq!(
        zones.remove_records(None, &record("host", "")),
        Err(ZoneError::NoZone(".".to_owned()))
    );

    zones
        .set(zone(Some("docker.internal"), &[("only", "10.0.0.9")], None))
        .unwrap();
    let answer = ask(&zones, "gateway.docker.internal.", RecordType::A).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(zones.remove(Some(&docker)).is_some());
    assert!(zones.remove(None).is_none());
    assert!(ask(&zones, "host.docker.internal.", RecordType::A).is_none());
}

#[test]
fn zones_records_and_patterns_are_bounded() {
    let mut zones = Zones::new();
    for n in 0..ZONES_MAX {
        zones.set(zone(Some(&format!("z{n}.test")), &[], None)).unwrap();
    }
    assert_eq!(
        zones.set(zone(Some("more.test"), &[], None)),
        Err(ZoneError::TooMany)
    );
    let names: Vec<String> = (0..ZONE_RECORDS_MAX).map(|n| format!("n{n}")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|n| (&**n, "10.0.0.1")).collect();
    zones.set(zone(Some("z0.test"), &many, None)).unwrap();
    assert_eq!(
        zones.merge(zone(Some("z0.test"), &[("one", "10.0.0.1")], None)),
        Err(ZoneError::TooLarge(ZONE_RECORDS_MAX + 1))
    );
    assert_eq!(
        zones.list()[0].records.len(),
        ZONE_RECORDS_MAX,
        "nothing is changed"
    );

    let patterns: Vec<String> = (0..=ZONE_PATTERNS_MAX).map(|n| format!("/p{n}/")).collect();
    let patterns: Vec<(&str, &str)> = patterns.iter().map(|p| (&**p, "10.0.0.1")).collect();
    let (most, one) = patterns.split_at(ZONE_PATTERNS_MAX);
    zones.set(zone(Some("z1.test"), most, None)).unwrap();
    assert_eq!(
        zones.set(zone(Some("z2.test"), one, None)),
        Err(ZoneError::TooManyPatterns(ZONE_PATTERNS_MAX + 1)),
        "of all zones together"
    );
    zones.set(zone(Some("z1.test"), &most[1..], None)).unwrap();
    zones.set(zone(Some("z2.test"), one, None)).unwrap();
}
