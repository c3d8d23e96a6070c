//! Requests as clients send them, and the ways to make two readers disagree on one.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

fn agree(_: &Request) -> Result<(), InspectRefusal> {
    Ok(())
}

/// Names in the order in which they were asked about, bytes that may pass, and how it ended.
type Followed = (Vec<Option<String>>, u64, Result<Step, InspectRefusal>);

/// Follows bytes that arrive in these pieces; `denied.test` is not agreed.
fn follow<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Followed {
    let mut filter = Filter::default();
    let mut names = Vec::new();
    let mut end = Ok(Step::Going);
    for piece in pieces {
        end = filter.read(piece, &mut |request| {
            names.push(request.name.as_ref().map(ToString::to_string));
            match &request.name {
                Some(name) if name.as_str() == "denied.test" => Err(InspectRefusal::Mismatch {
                    spoken: Spoken::Http,
                    name: name.clone(),
                    port: 80,
                }),
                _ => Ok(()),
            }
        });
        assert!(filter.passed() <= filter.seen());
        if end != Ok(Step::Going) {
            break;
        }
    }
    (names, filter.passed(), end)
}

/// As [`follow`], whole and in all pieces of one and of seven bytes, which must come to the same.
fn follow_each_way(bytes: &[u8]) -> Followed {
    let whole = follow([bytes]);
    for size in [1, 7] {
        assert_eq!(whole, follow(bytes.chunks(size)), "{}", bytes.escape_ascii());
    }
    whole
}

fn why(head: &str) -> String {
    match parse(head.as_bytes()) {
        Ok(request) => panic!("{head:?} was read as {request:?}"),
        Err(refusal) => refusal.to_string(),
    }
}

fn get(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")
}

#[test]
fn every_request_of_a_connection_is_asked_about() {
    let (first, second) = (get("one.test"), get("two.test:8080"));
    let bytes = format!("{first}{second}{first}");
    let (names, passed, end) = follow_each_way(bytes.as_bytes());
    let expected = ["one.test", "two.test", "one.test"].map(|name| Some(name.to_owned()));
    assert_eq!(names, expected);
    assert_eq!((passed, end), (bytes.len() as u64, Ok(Step::Going)));
}

#[test]
fn a_request_for_another_name_stops_what_comes_behind_it() {
    let first = get("one.test");
    let bytes = format!("{first}{}{first}", get("denied.test"));
    let (names, passed, end) = follow_each_way(bytes.as_bytes());
    assert_eq!(names.len(), 2);
    assert_eq!(passed, first.len() as u64);
    assert_eq!(end.unwrap_err().word(), "name_mismatch");
}

#[test]
fn a_head_is_held_until_it_is_whole() {
    let head = get("one.test");
    for at in 1..head.len() {
        assert_eq!(follow([&head.as_bytes()[..at]]).1, 0);
        let (first, second) = head.as_bytes().split_at(at);
        assert_eq!(follow([first, second]).1, head.len() as u64);
    }
}

#[test]
fn bodies_pass_as_they_come_and_the_next_request_is_found_behind_them() {
    // What looks like a request inside a body is none.
    let inside = get("denied.test");
    let length = format!(
        "POST /a HTTP/1.1\r\nHost: one.test\r\nContent-Length: {}\r\n\r\n{inside}",
        inside.len()
    );
    let chunked = format!(
        "PUT /b HTTP/1.1\r\nhost:one.test\r\ntransfer-encoding: Chunked\r\n\r\n{:x}\r\n{inside}\r\n00A\r\n0123456789\r\n0\r\n\r\n",
        inside.len()
    );
    let trailer =
        "PUT /c HTTP/1.1\r\nHost: one.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nDigest: x\r\n\r\n";
    for request in [&length, &chunked, trailer] {
        for cut in 1..request.len() {
            let (first, second) = request.as_bytes().split_at(cut);
            assert_eq!(follow([first, second]).1, request.len() as u64);
        }
        let bytes = format!("{request}{}", get("denied.test"));
        let (names, passed, end) = follow_each_way(bytes.as_bytes());
        assert_eq!(
            names,
            [Some("one.test".to_owned()), Some("denied.test".to_owned())]
        );
        assert_eq!(passed, request.len() as u64);
        assert!(end.is_err());
    }
    let head = length.len() - inside.len();
    assert_eq!(follow([&length.as_bytes()[..head + 5]]).1, head as u64 + 5);
}

#[test]
fn the_name_is_that_of_the_target_or_of_host_and_they_must_agree() {
    let name = |head: &str| parse(head.as_bytes()).unwrap().name.map(|n| n.to_string());
    for (head, expected) in [
        ("GET / HTTP/1.1\r\nHost: One.Test\r\n\r\n", "one.test"),
        ("GET / HTTP/1.1\r\nHost:one.test. \t\r\n\r\n", "one.test"),
        (
            "GET http://one.test/a HTTP/1.1\r\nHost: one.test:80\r\n\r\n",
            "one.test",
        ),
        (
            "GET HTTP://ONE.test:81/ HTTP/1.1\r\nHost: one.test\r\n\r\n",
            "one.test",
        ),
        ("OPTIONS * HTTP/1.1\r\nHost: one.test\r\n\r\n", "one.test"),
        ("GET http://one.test HTTP/1.0\r\n\r\n", "one.test"),
        (
            "GET //denied.test/ HTTP/1.1\r\nHost: one.test\r\n\r\n",
            "one.test",
        ),
    ] {
        assert_eq!(name(head).as_deref(), Some(expected), "{head:?}");
    }
    assert_eq!(name("GET / HTTP/1.0\r\n\r\n"), None);
    for head in [
        "GET http://denied.test/ HTTP/1.1\r\nHost: one.test\r\n\r\n",
        "GET http://one.test/ HTTP/1.1\r\nHost: denied.test\r\n\r\n",
        "CONNECT denied.test:443 HTTP/1.1\r\nHost: one.test\r\n\r\n",
    ] {
        assert_eq!(parse(head.as_bytes()).unwrap_err().word(), "names_disagree");
    }
}

#[test]
fn a_missing_or_second_host_is_refused() {
    for head in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost:\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: :80\r\n\r\n",
        "GET http:///x HTTP/1.1\r\nHost: one.test\r\n\r\n",
        "GET http://one.test/ HTTP/1.1\r\nAccept: */*\r\n\r\n",
    ] {
        let word = parse(head.as_bytes()).unwrap_err().word();
        assert!(
            word == "name_missing" || word == "name_malformed",
            "{head:?}: {word}"
        );
    }
    for second in ["Host: one.test", "hOST: denied.test", "HOST:"] {
        let head = format!("GET / HTTP/1.1\r\nHost: one.test\r\nA: b\r\n{second}\r\n\r\n");
        assert!(why(&head).contains("two Hosts"));
    }
}

#[test]
fn hosts_that_are_no_names_are_refused() {
    for host in [
        "192.0.2.7",
        "[2001:db8::7]",
        "2001:db8::7",
        "one.test:",
        "one.test:x",
        "one.test:99999",
        "one.test:80:80",
        "user@one.test",
        "one.test,denied.test",
        "one.test denied.test",
        "one.test/denied",
        "*.test",
        "a..b",
        "0x7f.1",
        "%6fne.test",
        "one.test\u{a0}",
        "m\u{fc}nchen.example",
        "one.test..",
    ] {
        let refusal = parse(get(host).as_bytes()).unwrap_err();
        assert_eq!(refusal.word(), "name_malformed", "{host:?}: {refusal}");
    }
    let target = "GET http://one.test\\@denied.test/ HTTP/1.1\r\nHost: one.test\r\n\r\n";
    assert!(parse(target.as_bytes()).is_err());
    let target = "GET http://a@one.test/ HTTP/1.1\r\nHost: one.test\r\n\r\n";
    assert_eq!(parse(target.as_bytes()).unwrap_err().word(), "name_malformed");
}

#[test]
fn what_makes_two_servers_disagree_on_a_request_is_refused() {
    let with = |line: &str| format!("POST / HTTP/1.1\r\nHost: one.test\r\n{line}\r\n\r\n");
    for (line, expected) in [
        (
            "Content-Length: 3\r\nTransfer-Encoding: chunked",
            "a length beside",
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 3",
            "a length beside",
        ),
        ("Content-Length: 3\r\nContent-Length: 3", "two lengths"),
        ("Content-Length: 3, 3", "plain number"),
        ("Content-Length: +3", "plain number"),
        ("Content-Length: -1", "plain number"),
        ("Content-Length: 0x3", "plain number"),
        ("Content-Length:", "plain number"),
        ("Content-Length: 3 3", "plain number"),
        ("Content-Length: 9999999999999999999", "plain number"),
        ("Transfer-Encoding: gzip, chunked", "other than chunked"),
        ("Transfer-Encoding: chunked, identity", "other than chunked"),
        ("Transfer-Encoding: xchunked", "other than chunked"),
        ("Transfer-Encoding:", "other than chunked"),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "two transfer codings",
        ),
        ("A: b\r\n folded: yes", "header's name"),
        ("A: b\r\n\tHost: denied.test", "header's name"),
        ("Content-Length : 3", "header's name"),
        ("Host : denied.test", "header's name"),
        (" Host: denied.test", "header's name"),
        (": nameless", "header's name"),
        ("no colon", "header's name"),
        ("A: b\0c", "header's value"),
    ] {
        assert!(
            why(&with(line)).contains(expected),
            "{line:?}: {}",
            why(&with(line))
        );
    }
    for (head, expected) in [
        ("get / HTTP/1.1\r\nHost: one.test\r\n\r\n", "upper case"),
        ("Get / HTTP/1.1\r\nHost: one.test\r\n\r\n", "upper case"),
        ("\r\nGET / HTTP/1.1\r\nHost: one.test\r\n\r\n", "upper case"),
        ("GET  / HTTP/1.1\r\nHost: one.test\r\n\r\n", "method or target"),
        ("GET /\r\nHost: one.test\r\n\r\n", "method or target"),
        ("GET / HTTP/1.2\r\nHost: one.test\r\n\r\n", "version"),
        ("GET / http/1.1\r\nHost: one.test\r\n\r\n", "version"),
        (
            "GET one.test HTTP/1.1\r\nHost: one.test\r\n\r\n",
            "neither a path",
        ),
        (
            "GET https://one.test/ HTTP/1.1\r\nHost: one.test\r\n\r\n",
            "neither a path",
        ),
        ("GET * HTTP/1.1\r\nHost: one.test\r\n\r\n", "neither a path"),
        (
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            "other than chunked",
        ),
    ] {
        assert!(why(head).contains(expected), "{head:?}: {}", why(head));
    }
}

#[test]
fn a_line_end_that_stands_alone_is_refused_wherever_it_stands() {
    for bytes in [
        "GET / HTTP/1.1\nHost: one.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: one.test\n\r\n",
        "GET / HTTP/1.1\r\nHost: one.test\r\n\n",
        "GET / HTTP/1.1\r\nHost: one.test\rHost: denied.test\r\n\r\n",
        "GET / HTTP/1.1\r\r\nHost: one.test\r\n\r\n",
        "\nGET / HTTP/1.1\r\nHost: one.test\r\n\r\n",
    ] {
        let (_, passed, end) = follow_each_way(bytes.as_bytes());
        assert!(end.unwrap_err().to_string().contains("stands alone"), "{bytes:?}");
        assert_eq!(passed, 0);
    }
}

#[test]
fn chunks_that_are_not_exactly_so_are_refused() {
    let head = "PUT / HTTP/1.1\r\nHost: one.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in [
        "\r\n",
        "g\r\n",
        "0x1\r\n",
        "+1\r\n",
        " 1\r\n",
        "1 \r\n",
        "1;a=b\r\n",
        "1\n",
        "1\r\r",
        "1\r\nab",
        "1\r\na\n",
        "1\r\na\r1",
        "1111111111111111\r\n",
        "0\r\n\n",
        "0\r\nHost: denied.test\r\n\r\n",
        "0\r\nContent-Length: 5\r\n\r\n",
        "0\r\nA : b\r\n\r\n",
    ] {
        let (names, passed, end) = follow_each_way(format!("{head}{body}").as_bytes());
        assert_eq!(names.len(), 1, "{body:?}");
        assert!(end.is_err(), "{body:?}");
        assert!(passed < (head.len() + body.len()) as u64, "{body:?}");
    }
}

#[test]
fn http_2_without_tls_is_refused() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let (names, passed, end) = follow_each_way(preface);
    assert_eq!((names.len(), passed, end), (0, 0, Err(InspectRefusal::H2c)));
    for upgrade in ["h2c", "websocket, H2C", "foo/1 , h2c"] {
        let head = format!("GET / HTTP/1.1\r\nHost: one.test\r\nUpgrade: {upgrade}\r\n\r\n");
        assert_eq!(parse(head.as_bytes()), Err(InspectRefusal::H2c));
    }
}

#[test]
fn other_protocols_are_told() {
    for bytes in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"\0\0\0\x08", b"EHLO a.test\r\n"] {
        let (names, passed, end) = follow_each_way(bytes);
        assert_eq!((names.len(), passed, end), (0, 0, Ok(Step::NotHttp)));
    }
    // Not behind a request.
    let bytes = format!("{}SSH-2.0-OpenSSH_9.2\r\n\r\n", get("one.test"));
    assert!(follow_each_way(bytes.as_bytes()).2.is_err());
}

const UPGRADE: &[u8] =
    b"GET /chat HTTP/1.1\r\nHost: one.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

#[test]
fn an_upgrade_waits_for_the_servers_answer() {
    let mut filter = Filter::default();
    assert!(!filter.wants_answer());
    let bytes = [UPGRADE, b"early"].concat();
    assert_eq!(filter.read(&bytes, &mut agree), Ok(Step::Going));
    let taken = UPGRADE.len() as u64;
    assert_eq!((filter.seen(), filter.passed()), (taken, taken));
    assert!(filter.wants_answer());
    assert_eq!(filter.read(b"early", &mut agree), Ok(Step::Going));
    assert_eq!(filter.passed(), taken);

    let answer = b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x81";
    for byte in &answer[..answer.len() - 2] {
        assert_eq!(
            filter.read_answer(std::slice::from_ref(byte)),
            Ok(Step::Going),
            "{}",
            byte.escape_ascii()
        );
    }
    assert_eq!(
        filter.read_answer(&answer[answer.len() - 2..]),
        Ok(Step::Upgraded)
    );
    assert_eq!(filter.read(b"\x81", &mut agree), Ok(Step::Upgraded));
}

#[test]
fn an_upgrade_that_the_server_declines_changes_nothing() {
    let mut filter = Filter::default();
    filter.read(UPGRADE, &mut agree).unwrap();
    let answer =
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\nContent-Length: 26\n\nHTTP/1.1 101 Not one\r\n\r\n";
    assert_eq!(filter.read_answer(answer), Ok(Step::Going));
    assert!(!filter.wants_answer());
    // What answers the next requests is no longer looked at, and an upgrade is no longer possible.
    assert_eq!(filter.read_answer(b"HTTP/1.1 101 Late\r\n\r\n"), Ok(Step::Going));
    let next = get("one.test");
    filter.read(next.as_bytes(), &mut agree).unwrap();
    assert_eq!(filter.passed(), (UPGRADE.len() + next.len()) as u64);
    assert!(filter.read(UPGRADE, &mut agree).is_err());
}

#[test]
fn an_upgrade_behind_other_requests_is_refused() {
    let bytes = [get("one.test").as_bytes(), UPGRADE].concat();
    let (_, passed, end) = follow_each_way(&bytes);
    assert_eq!(passed, get("one.test").len() as u64);
    assert!(end.unwrap_err().to_string().contains("first request"));
    let body = b"POST / HTTP/1.1\r\nHost: one.test\r\nUpgrade: x\r\nContent-Length: 1\r\n\r\n";
    assert!(follow_each_way(body).2.unwrap_err().to_string().contains("body"));
}

#[test]
fn an_answer_that_is_none_or_never_ends_is_refused() {
    let mut filter = Filter::default();
    filter.read(UPGRADE, &mut agree).unwrap();
    assert!(filter.read_answer(b"SSH-2.0-x\r\n\r\n").is_err());

    let mut filter = Filter::default();
    filter.read(UPGRADE, &mut agree).unwrap();
    let endless = vec![b'a'; super::super::HELD_BYTES_MAX];
    assert_eq!(filter.read_answer(&endless), Ok(Step::Going));
    assert_eq!(filter.read_answer(b"a").unwrap_err().word(), "name_limit");
}

#[test]
fn a_tunnel_is_for_the_name_that_it_asks_for() {
    let head = b"CONNECT one.test:443 HTTP/1.1\r\nHost: one.test:443\r\n\r\n";
    let request = parse(head).unwrap();
    assert_eq!(
        (request.name.unwrap().as_str(), request.tunnel),
        ("one.test", Some(443))
    );
    for (status, step) in [
        ("200 Connection established", Step::Tunnel(443)),
        ("407 No", Step::Going),
    ] {
        let mut filter = Filter::default();
        filter.read(head, &mut agree).unwrap();
        let answer = format!("HTTP/1.1 {status}\r\n\r\n");
        assert_eq!(filter.read_answer(answer.as_bytes()), Ok(step));
    }
    for target in [
        "one.test",
        "one.test:",
        "/",
        "http://one.test:443/",
        "192.0.2.7:443",
    ] {
        let head = format!("CONNECT {target} HTTP/1.1\r\nHost: one.test\r\n\r\n");
        assert!(parse(head.as_bytes()).is_err(), "{target}");
    }
    let body = b"CONNECT one.test:443 HTTP/1.1\r\nHost: one.test\r\nContent-Length: 4\r\n\r\n";
    assert!(follow_each_way(body).2.is_err());
}

#[test]
fn heads_and_their_lines_are_limited() {
    let endless = format!("GET /{} ", "a".repeat(super::super::HELD_BYTES_MAX));
    for pieces in [1000, endless.len()] {
        let (_, passed, end) = follow(endless.as_bytes().chunks(pieces));
        assert_eq!((passed, end.unwrap_err().word()), (0, "name_limit"));
    }
    let lines = |count| {
        format!(
            "GET / HTTP/1.1\r\nHost: one.test\r\n{}\r\n",
            "A: b\r\n".repeat(count)
        )
    };
    assert!(parse(lines(HEADERS_MAX - 1).as_bytes()).is_ok());
    assert!(why(&lines(HEADERS_MAX)).contains("more header lines"));
}

#[test]
fn changed_requests_never_panic_and_pieces_make_no_difference() {
    let seeds = [
        get("one.test"),
        format!("{}{}", get("one.test"), get("denied.test")),
        "POST / HTTP/1.1\r\nHost: one.test\r\nContent-Length: 9\r\n\r\n123456789GET / HTTP/1.0\r\n\r\n".into(),
        "PUT http://one.test:80/ HTTP/1.1\r\nHost: one.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\nA: b\r\n\r\nGET / HTTP/1.1\r\nHost: one.test\r\n\r\n"
            .into(),
        "CONNECT one.test:443 HTTP/1.1\r\nHost: one.test\r\n\r\n\x16\x03\x01".into(),
    ];
    let mut random = StdRng::seed_from_u64(11);
    let spice = b"\r\n :\0\t09aAh/.,;\x80";
    let (mut whole_ones, mut refused) = (0, 0);
    for round in 0..20_000 {
        let mut bytes = seeds[round % seeds.len()].clone().into_bytes();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            let spiced = spice[random.random_range(0..spice.len())];
            match random.random_range(0..4) {
                0 => bytes[at] = spiced,
                1 => bytes.insert(at, spiced),
                2 => drop(bytes.remove(at)),
                _ => bytes[at] = random.random(),
            }
        }
        let whole = follow([&bytes[..]]);
        let mut pieces = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(random.random_range(1..=rest.len()));
            pieces.push(piece);
            rest = after;
        }
        assert_eq!(whole, follow(pieces), "{}", bytes.escape_ascii());
        whole_ones += usize::from(whole.1 == bytes.len() as u64);
        refused += usize::from(whole.2.is_err());
    }
    assert!(whole_ones > 500 && refused > 5_000, "{whole_ones} {refused}");
}
