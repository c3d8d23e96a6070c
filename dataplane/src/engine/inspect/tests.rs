//! Whole connections under a demand.

use super::tls::tests::{hello_with, in_records, server_name_extension};
use super::*;

fn demand(level: Level, port: u16) -> Demand<NameList> {
    Demand {
        names: NameList {
            names: vec!["allowed.test".parse().unwrap(), "wide.test".parse().unwrap()],
            ports: PortRange::one(port),
        },
        level,
        deny_ech: false,
        deny_quic: false,
        port,
    }
}

fn inspector(level: Level, port: u16) -> Inspector<NameList> {
    Inspector::new(demand(level, port))
}

fn tls(name: &str) -> Vec<u8> {
    in_records(
        &hello_with(&[server_name_extension(&[(0, name.as_bytes())])]),
        999,
    )
}

fn get(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

#[track_caller]
fn refused(progress: &Progress) -> &'static str {
    match progress {
        Progress::Refuse(refusal) => refusal.word(),
        other => panic!("{other:?}"),
    }
}

/// The word of a refusal, or the bytes that passed.
fn outcome(level: Level, port: u16, bytes: &[u8]) -> Result<u64, &'static str> {
    let mut inspector = inspector(level, port);
    match inspector.handle(bytes) {
        Progress::Refuse(refusal) => Err(refusal.word()),
        _ => Ok(inspector.passed().min(bytes.len() as u64)),
    }
}

use Level::{MatchIfPresent, Require};

#[test]
fn a_required_name_must_be_spoken_in_the_ports_protocol() {
    let all = |bytes: &[u8]| Ok(bytes.len() as u64);
    let (good, bad) = (tls("allowed.test"), tls("denied.test"));
    let nameless = in_records(&hello_with(&[]), 999);
    for port in [443, 8443] {
        assert_eq!(outcome(Require, port, &good), all(&good));
        assert_eq!(outcome(Require, port, &bad), Err("name_mismatch"));
        assert_eq!(outcome(Require, port, &nameless), Err("name_missing"));
    }
    let (good, bad) = (get("allowed.test"), get("denied.test"));
    for port in [80, 8080] {
        assert_eq!(outcome(Require, port, &good), all(&good));
        assert_eq!(outcome(Require, port, &bad), Err("name_mismatch"));
        assert_eq!(
            outcome(Require, port, b"GET / HTTP/1.0\r\n\r\n"),
            Err("name_missing")
        );
    }
    assert_eq!(
        outcome(Require, 443, &get("allowed.test")),
        Err("name_unreadable")
    );
    assert_eq!(outcome(Require, 80, &tls("allowed.test")), Err("name_unreadable"));
    for port in [22, 80, 443] {
        assert_eq!(outcome(Require, port, b"SSH-2.0-a\r\n"), Err("name_unreadable"));
        assert_eq!(outcome(Require, port, b"\x16\x10"), Err("name_unreadable"));
    }
}

#[test]
fn where_a_name_is_only_matched_other_protocols_pass_and_other_names_do_not() {
    for port in [22, 80, 443, 8443] {
        for bytes in [
            &b"SSH-2.0-a\r\n"[..],
            b"\0\0\0\x08",
            b"\x16\x10",
            b"EHLO a\r\n",
            &in_records(&hello_with(&[]), 999),
            b"GET / HTTP/1.0\r\n\r\n",
            &tls("allowed.test"),
            &get("wide.test"),
        ] {
            assert_eq!(
                outcome(MatchIfPresent, port, bytes),
                Ok(bytes.len() as u64),
                "{}",
                bytes.escape_ascii()
            );
        }
        for bytes in [tls("denied.test"), get("denied.test"), get("a.wide.test")] {
            assert_eq!(outcome(MatchIfPresent, port, &bytes), Err("name_mismatch"));
        }
        for bytes in [
            &b"PRI * HTTP/2.0\r\n\r\n"[..],
            &[&[21, 3, 1, 0, 2, 1, 90][..], &tls("denied.test")].concat(),
            b"\r\nGET / HTTP/1.1\r\nHost: denied.test\r\n\r\n",
            b"get / HTTP/1.1\r\nHost: denied.test\r\n\r\n",
        ] {
            assert!(outcome(MatchIfPresent, port, bytes).is_err());
        }
    }
}

#[test]
fn a_tls_connection_is_read_until_no_hello_can_follow() {
    let mut inspector = inspector(Require, 443);
    let hello = tls("allowed.test");
    assert_eq!(inspector.handle(&hello[..20]), Progress::NeedMore);
    assert_eq!(inspector.handle(&hello[20..]), Progress::Pass(hello.len() as u64));
    assert_eq!(inspector.seen(), hello.len() as u64);
    let data = [23, 3, 3, 0, 2, 1, 1];
    assert_eq!(inspector.handle(&data[..3]), Progress::NeedMore);
    assert_eq!(inspector.handle(&data[3..]), Progress::PassAll);
    assert_eq!(inspector.handle(b"anything"), Progress::PassAll);

    let mut inspector = self::inspector(Require, 443);
    inspector.handle(&hello);
    assert_eq!(refused(&inspector.handle(&tls("denied.test"))), "name_mismatch");
    assert_eq!(refused(&inspector.handle(&hello)), "name_mismatch");
    assert_eq!(inspector.passed(), hello.len() as u64);
}

#[test]
fn encrypted_hellos_pass_with_their_outer_name_or_are_denied() {
    let hello = in_records(
        &hello_with(&[
            server_name_extension(&[(0, b"allowed.test")]),
            (0xffce, vec![1; 40]),
        ]),
        999,
    );
    assert_eq!(outcome(Require, 443, &hello), Ok(hello.len() as u64));
    for level in [Require, MatchIfPresent] {
        let mut denying = Inspector::new(Demand {
            deny_ech: true,
            ..demand(level, 443)
        });
        assert_eq!(refused(&denying.handle(&hello)), "ech_denied");
    }
}

#[test]
fn a_later_request_for_another_host_is_refused() {
    let mut inspector = inspector(Require, 80);
    let first = get("allowed.test");
    assert_eq!(inspector.handle(&first), Progress::Pass(first.len() as u64));
    assert_eq!(refused(&inspector.handle(&get("denied.test"))), "name_mismatch");
    assert_eq!(inspector.passed(), first.len() as u64);
}

#[test]
fn a_tunnel_is_inspected_like_a_connection_of_its_own() {
    let connect = b"CONNECT allowed.test:8443 HTTP/1.1\r\nHost: allowed.test\r\n\r\n";
    let mut elsewhere = inspector(Require, 3128);
    assert_eq!(refused(&elsewhere.handle(connect)), "name_mismatch");

    let wide = || {
        let mut demand = demand(Require, 3128);
        demand.names.ports = PortRange::new(1, 65_535).unwrap();
        Inspector::new(demand)
    };
    let open = |inspector: &mut Inspector<NameList>| {
        let bytes = [&connect[..], b"SSH"].concat();
        assert_eq!(inspector.handle(&bytes), Progress::Pass(connect.len() as u64));
        assert!(inspector.wants_answer());
        assert_eq!(inspector.handle(b"SSH"), Progress::NeedMore);
        inspector.handle_answer(b"HTTP/1.1 200 OK\r\n\r\n");
        assert!(!inspector.wants_answer());
        assert_eq!(inspector.seen(), connect.len() as u64);
    };
    let mut inspector = wide();
    open(&mut inspector);
    let hello = tls("allowed.test");
    assert_eq!(
        inspector.handle(&hello),
        Progress::Pass((connect.len() + hello.len()) as u64)
    );
    let mut inspector = wide();
    open(&mut inspector);
    assert_eq!(refused(&inspector.handle(&tls("denied.test"))), "name_mismatch");
    let mut inspector = wide();
    open(&mut inspector);
    assert_eq!(refused(&inspector.handle(b"SSH-2.0-a\r\n")), "name_unreadable");
}

#[test]
fn an_upgrade_that_was_taken_ends_the_checks() {
    let upgrade = b"GET / HTTP/1.1\r\nHost: allowed.test\r\nUpgrade: websocket\r\n\r\n";
    let mut inspector = inspector(Require, 80);
    assert_eq!(inspector.handle(upgrade), Progress::Pass(upgrade.len() as u64));
    assert!(!inspector.is_waiting());
    assert_eq!(
        inspector.handle_answer(b"HTTP/1.1 101 OK\r\n\r\n"),
        Progress::PassAll
    );
    assert_eq!(inspector.handle(&get("denied.test")), Progress::PassAll);
}

#[test]
fn silence_ends_where_a_name_is_demanded_and_only_there() {
    let mut silent = inspector(Require, 443);
    assert!(silent.is_waiting());
    assert_eq!(refused(&silent.handle_late()), "name_late");
    assert_eq!(refused(&silent.handle(&tls("allowed.test"))), "name_late");

    let mut silent = inspector(MatchIfPresent, 22);
    assert!(!silent.is_waiting());
    assert_eq!(silent.handle_late(), Progress::NeedMore);

    // What began a hello or a request must end it.
    for bytes in [&tls("allowed.test")[..30], b"GET / HT"] {
        for level in [Require, MatchIfPresent] {
            let mut half = inspector(level, 8080);
            assert_eq!(half.handle(bytes), Progress::NeedMore);
            assert!(half.is_waiting());
            assert_eq!(refused(&half.handle_late()), "name_late");
        }
    }
    let mut agreed = inspector(Require, 80);
    agreed.handle(&get("allowed.test"));
    assert!(!agreed.is_waiting());
    assert_eq!(agreed.handle_late(), Progress::NeedMore);
}

#[test]
fn records_of_one_byte_are_held_to_the_limit() {
    let hello = hello_with(&[
        server_name_extension(&[(0, b"allowed.test")]),
        (0x1234, vec![0; 20_000]),
    ]);
    let wire = in_records(&hello, 1);
    assert_eq!(outcome(Require, 443, &wire[..60_000]), Ok(0));
    assert_eq!(outcome(Require, 443, &wire[..66_000]), Err("name_limit"));
    let whole = in_records(&hello, 999);
    assert_eq!(outcome(Require, 443, &whole), Ok(whole.len() as u64));
}

#[test]
fn datagrams_follow_the_demand() {
    // Not QUIC at all.
    let other = b"\x01\0\0\0wireguard";
    let mut required = DatagramInspector::new(demand(Require, 443));
    assert!(required.is_waiting());
    assert!(matches!(required.handle(other), DatagramProgress::Refuse(_)));
    assert!(!required.is_waiting());
    assert!(matches!(required.handle(other), DatagramProgress::Refuse(_)));

    let mut matching = DatagramInspector::new(demand(MatchIfPresent, 51_820));
    assert_eq!(matching.handle(other), DatagramProgress::Pass);
    assert!(!matching.is_waiting());
    assert_eq!(matching.handle_late(), DatagramProgress::Drop);

    let mut late = DatagramInspector::new(demand(Require, 443));
    assert_eq!(late.handle_late(), DatagramProgress::Refuse(InspectRefusal::Late));
}

#[test]
fn refusals_say_what_was_found_and_expected() {
    let mismatch = InspectRefusal::Mismatch {
        spoken: Spoken::Tls,
        name: "denied.test".parse().unwrap(),
        port: 443,
    };
    assert_eq!(
        mismatch.to_string(),
        "TLS names denied.test at port 443, which the rule or grant does not name"
    );
    assert_eq!(
        InspectRefusal::Late.to_string(),
        "no whole name came within 5 s (expected a TLS or QUIC hello, or an HTTP request)"
    );
    let shown = InspectRefusal::not_a_name(Spoken::Http, &[0x1b; 1000], None).to_string();
    assert!(
        shown.is_ascii() && !shown.contains('\x1b') && shown.len() < 400,
        "{shown}"
    );
}
