//! Hellos as clients send them, and as they should not be.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::*;

/// What rustls' own client sends first.
fn client_hello(name: &'static str, change: impl FnOnce(&mut ClientConfig)) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    change(&mut config);
    let mut client = ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
    let mut wire = Vec::new();
    client.write_tls(&mut wire).unwrap();
    wire
}

/// A hello with these extensions besides those that it must have.
pub(in crate::engine) fn hello_with(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    const SIGNATURE_ALGORITHMS: u16 = 13;
    let mut listed = Vec::new();
    let algorithms = (SIGNATURE_ALGORITHMS, vec![0, 2, 4, 3]);
    for (kind, body) in std::iter::once(&algorithms).chain(extensions) {
        listed.extend_from_slice(&kind.to_be_bytes());
        listed.extend_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
        listed.extend_from_slice(body);
    }
    let mut body = vec![3, 3];
    body.extend_from_slice(&[7; 32]);
    body.extend_from_slice(&[0, 0, 2, 0x13, 1, 1, 0]);
    body.extend_from_slice(&u16::try_from(listed.len()).unwrap().to_be_bytes());
    body.extend_from_slice(&listed);
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[CLIENT_HELLO], &length[1..], &body].concat()
}

pub(in crate::engine) fn server_name_extension(names: &[(u8, &[u8])]) -> (u16, Vec<u8>) {
    let mut list = Vec::new();
    for (kind, name) in names {
        list.push(*kind);
        list.extend_from_slice(&u16::try_from(name.len()).unwrap().to_be_bytes());
        list.extend_from_slice(name);
    }
    let mut body = u16::try_from(list.len()).unwrap().to_be_bytes().to_vec();
    body.extend_from_slice(&list);
    (SERVER_NAME, body)
}

fn named(name: &[u8]) -> Vec<u8> {
    hello_with(&[server_name_extension(&[(HOST_NAME, name)])])
}

/// Puts handshake bytes into records of so many bytes.
pub(in crate::engine) fn in_records(handshake: &[u8], bytes: usize) -> Vec<u8> {
    handshake
        .chunks(bytes)
        .flat_map(|part| record(HANDSHAKE, part))
        .collect()
}

fn record(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap().to_be_bytes();
    [&[kind, 3, 1], &length[..], body].concat()
}

/// Everything that comes of bytes which arrive in these pieces.
fn read_all<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Reading>, InspectRefusal> {
    let mut reader = Reader::default();
    let mut readings = Vec::new();
    for piece in pieces {
        let mut rest = piece;
        while !rest.is_empty() {
            let before = reader.seen();
            let reading = reader.read(rest)?;
            assert!(reader.passed() <= reader.seen());
            rest = &rest[usize::try_from(reader.seen() - before).unwrap()..];
            let over = matches!(reading, Reading::Done | Reading::NotTls);
            if reading != Reading::NeedMore {
                readings.push(reading);
            }
            if over {
                return Ok(readings);
            }
        }
    }
    Ok(readings)
}

fn one_hello(wire: &[u8]) -> Result<Hello, InspectRefusal> {
    match read_all([wire])?.as_slice() {
        [Reading::Hello(hello)] => Ok(hello.clone()),
        other => panic!("{other:?}"),
    }
}

fn name_of(wire: &[u8]) -> Option<String> {
    one_hello(wire).unwrap().name.map(|name| name.to_string())
}

fn why(handshake: &[u8]) -> &'static str {
    match one_hello(&in_records(handshake, 1000)) {
        Err(refusal) => refusal.word(),
        Ok(hello) => panic!("{hello:?}"),
    }
}

fn all_recorded() -> Vec<(Vec<u8>, Option<&'static str>)> {
    let name = Some("api.example.test");
    vec![
        (recorded::bytes(recorded::OPENSSL_TLS_1_3), name),
        (recorded::bytes(recorded::OPENSSL_TLS_1_2), name),
        (recorded::bytes(recorded::CURL), name),
        (recorded::bytes(recorded::PYTHON_UPPER_CASE), name),
        (recorded::bytes(recorded::OPENSSL_NO_NAME), None),
        (client_hello("api.example.test", |_| {}), name),
        (client_hello("api.example.test", |c| c.enable_sni = false), None),
        (client_hello("192.0.2.7", |_| {}), None),
    ]
}

#[test]
fn hellos_of_real_clients_are_read_at_every_split() {
    for (wire, name) in all_recorded() {
        let whole = one_hello(&wire).unwrap();
        assert_eq!(whole.name.as_ref().map(Name::as_str), name);
        assert!(!whole.ech);
        let expected = vec![Reading::Hello(whole)];
        for at in 0..=wire.len() {
            let (first, second) = wire.split_at(at);
            assert_eq!(read_all([first, second]).as_ref(), Ok(&expected), "split at {at}");
        }
        assert_eq!(read_all(wire.chunks(1)).as_ref(), Ok(&expected));
    }
}

#[test]
fn a_hello_over_many_records_is_read_and_nothing_of_it_passes_before_its_end() {
    let handshake = named(b"api.example.test");
    for bytes in [1, 2, 3, 4, 5, 50, handshake.len() - 1, handshake.len()] {
        let wire = in_records(&handshake, bytes);
        assert_eq!(name_of(&wire).unwrap(), "api.example.test");
        let mut reader = Reader::default();
        for byte in &wire[..wire.len() - 1] {
            assert_eq!(
                reader.read(std::slice::from_ref(byte)).unwrap(),
                Reading::NeedMore
            );
            assert_eq!(reader.passed(), 0);
        }
        assert!(matches!(
            reader.read(&wire[wire.len() - 1..]),
            Ok(Reading::Hello(_))
        ));
        assert_eq!(reader.passed(), wire.len() as u64);
    }
}

#[test]
fn names_are_canonical_or_refused() {
    assert_eq!(
        name_of(&in_records(&named(b"API.Example.Test"), 99)).unwrap(),
        "api.example.test"
    );
    assert_eq!(
        name_of(&in_records(&named(b"xn--mnchen-3ya.example"), 99)).unwrap(),
        "xn--mnchen-3ya.example"
    );
    for text in [
        &b"api.example.test."[..],
        b"192.0.2.7",
        b"api.example.test\0",
        b"api.example.test\0.allowed.test",
        b"a..b",
        b".",
        b"*.example.test",
        b"a b.test",
        "m\u{fc}nchen.example".as_bytes(),
        b"\xff\xfe",
        b"2001:db8::7",
        b"127.1",
    ] {
        let word = why(&named(text));
        assert!(
            word == "name_malformed" || word == "hello_malformed",
            "{}: {word}",
            text.escape_ascii()
        );
    }
    let label = [b'a'; 63];
    let long = [label; 5].join(&b'.');
    assert_eq!(why(&named(&long)), "hello_malformed");
}

#[test]
fn an_address_in_the_place_of_a_name_is_not_taken_for_no_name() {
    assert_eq!(why(&named(b"192.0.2.7")), "name_malformed");
}

#[test]
fn a_name_that_two_servers_could_read_in_two_ways_is_refused() {
    let one = || server_name_extension(&[(HOST_NAME, b"allowed.test")]);
    let other = || server_name_extension(&[(HOST_NAME, b"denied.test")]);
    let both = server_name_extension(&[(HOST_NAME, b"allowed.test"), (HOST_NAME, b"denied.test")]);
    let unknown_kind = server_name_extension(&[(HOST_NAME, b"allowed.test"), (9, b"denied.test")]);
    let unknown_first = server_name_extension(&[(9, b"denied.test"), (HOST_NAME, b"allowed.test")]);
    let mut rest_behind = one();
    rest_behind.1.extend_from_slice(b"denied.test");
    for extensions in [
        vec![both],
        vec![unknown_kind],
        vec![unknown_first],
        vec![rest_behind],
        vec![one(), other()],
        vec![one(), one()],
        vec![(SERVER_NAME, vec![])],
        vec![(SERVER_NAME, vec![0, 0])],
        vec![server_name_extension(&[(HOST_NAME, b"")])],
    ] {
        assert_eq!(why(&hello_with(&extensions)), "hello_malformed", "{extensions:?}");
    }
}

#[test]
fn grease_and_unknown_extensions_change_nothing() {
    let hello = hello_with(&[
        (0x0a0a, vec![]),
        (0xfafa, vec![1, 2, 3]),
        server_name_extension(&[(HOST_NAME, b"api.example.test")]),
        (0x1234, vec![0; 700]),
        (0xcaca, vec![0]),
    ]);
    assert_eq!(name_of(&in_records(&hello, 300)).unwrap(), "api.example.test");
}

#[test]
fn an_encrypted_hello_is_told_with_its_outer_name() {
    // The outer form of RFC 9849 §5: kind, cipher suite, configuration, key and payload.
    let outer = [&[0u8, 0, 1, 0, 1, 7, 0, 4][..], &[9; 4], &[0, 8], &[5; 8]].concat();
    let hello = hello_with(&[
        server_name_extension(&[(HOST_NAME, b"public.test")]),
        (ENCRYPTED_CLIENT_HELLO, outer),
    ]);
    let read = one_hello(&in_records(&hello, 999)).unwrap();
    assert_eq!((read.name.unwrap().as_str(), read.ech), ("public.test", true));
    let older = hello_with(&[(ENCRYPTED_SERVER_NAME, vec![0; 90])]);
    let read = one_hello(&in_records(&older, 999)).unwrap();
    assert_eq!((read.name, read.ech), (None, true));
}

#[test]
fn the_hello_that_a_server_asks_for_is_read_too() {
    let first = in_records(&named(b"allowed.test"), 999);
    let second = in_records(&named(b"denied.test"), 40);
    let compatibility = record(CHANGE_CIPHER_SPEC, &[1]);
    for between in [&[][..], &compatibility] {
        let wire = [&first[..], between, &second].concat();
        for pieces in [1, 7, wire.len()] {
            let readings = read_all(wire.chunks(pieces)).unwrap();
            let names: Vec<_> = readings
                .into_iter()
                .map(|reading| match reading {
                    Reading::Hello(hello) => hello.name.unwrap().to_string(),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(names, ["allowed.test", "denied.test"]);
        }
    }
    let third = [&first[..], &second, &first].concat();
    assert_eq!(read_all([&third[..]]).unwrap_err().word(), "hello_malformed");
}

#[test]
fn early_data_does_not_hide_another_hello() {
    let early = hello_with(&[
        server_name_extension(&[(HOST_NAME, b"allowed.test")]),
        (EARLY_DATA, vec![]),
    ]);
    let data = record(APPLICATION_DATA, &[0x17; 900]);
    let second = in_records(&named(b"denied.test"), 999);
    let wire = [&in_records(&early, 999)[..], &data, &data, &second].concat();
    let readings = read_all(wire.chunks(100)).unwrap();
    assert!(
        matches!(&readings[..], [Reading::Hello(_), Reading::Hello(second)] if second.name.as_ref().unwrap().as_str() == "denied.test"),
        "{readings:?}"
    );
    // Early data itself passes as it comes.
    let mut reader = Reader::default();
    let begun = [&in_records(&early, 999)[..], &data[..300]].concat();
    let hello = reader.read(&begun).unwrap();
    assert!(matches!(hello, Reading::Hello(_)));
    let at = usize::try_from(reader.seen()).unwrap();
    assert_eq!(reader.read(&begun[at..]).unwrap(), Reading::NeedMore);
    assert_eq!(reader.passed(), begun.len() as u64);
}

#[test]
fn reading_ends_where_no_other_hello_can_follow() {
    let hello = in_records(&named(b"allowed.test"), 999);
    let key_exchange = record(HANDSHAKE, &[16, 0, 0, 1, 0]);
    let data = record(APPLICATION_DATA, &[1; 40]);
    for after in [key_exchange, data] {
        let wire = [&hello[..], &record(CHANGE_CIPHER_SPEC, &[1]), &after].concat();
        for pieces in [1, wire.len()] {
            let readings = read_all(wire.chunks(pieces)).unwrap();
            assert!(
                matches!(&readings[..], [Reading::Hello(_), Reading::Done]),
                "{readings:?}"
            );
        }
    }
}

#[test]
fn what_is_not_tls_is_told_at_once() {
    for bytes in [
        &b"GET / HTTP/1.1"[..],
        b"SSH-2.0-x",
        &[0x16, 0x10],
        // Of another version, and empty, too long, or no hello: MongoDB's messages may begin so.
        &[0x16, 1, 0, 0, 0],
        &[0x16, 2, 0, 0x40, 1],
        &[0x16, 1, 0, 0, 9, 0],
        &[0x15, 3, 1, 0, 3],
        &[0x15, 0x10],
        &[0x14, 3, 1, 0, 2],
        &[0x80, 0x2e, 1, 3, 1],
        &[23, 3, 3],
    ] {
        assert_eq!(read_all([bytes]), Ok(vec![Reading::NotTls]));
        assert_eq!(read_all(bytes.chunks(1)), Ok(vec![Reading::NotTls]));
    }
}

#[test]
fn small_records_before_the_hello_and_other_versions_of_its_record_hide_nothing() {
    let hello = in_records(&named(b"allowed.test"), 999);
    for before in [
        &[ALERT, 3, 1, 0, 2, 1, 90][..],
        &[ALERT, 3, 1, 0, 2, 1, 90, ALERT, 3, 3, 0, 2, 1, 0],
        &[CHANGE_CIPHER_SPEC, 3, 3, 0, 1, 1],
    ] {
        let wire = [before, &hello].concat();
        for readings in [read_all([&wire[..]]), read_all(wire.chunks(1))] {
            let readings = readings.unwrap();
            assert!(
                matches!(&readings[0], Reading::Hello(hello) if hello.name == Some("allowed.test".parse().unwrap())),
                "{readings:?}"
            );
        }
        // What a server has begun to read as TLS is nothing else any more.
        for after in [&b"SSH-2.0-x"[..], &[APPLICATION_DATA, 3, 3, 0, 1, 0]] {
            assert!(read_all([&[before, after].concat()[..]]).is_err());
        }
    }
    for version in [[0, 1], [2, 0], [4, 0], [15, 255]] {
        let mut wire = hello.clone();
        wire[1..3].copy_from_slice(&version);
        assert!(read_all([&wire[..]]).is_err());
        assert!(read_all(wire.chunks(1)).is_err());
        let behind = [&[ALERT, 3, 1, 0, 2, 1, 90][..], &wire].concat();
        assert!(read_all([&behind[..]]).is_err());
    }
}

#[test]
fn records_that_no_client_sends_are_refused() {
    let hello = named(b"allowed.test");
    let whole = in_records(&hello, 999);
    let cases = [
        record(HANDSHAKE, &[]),
        [&[HANDSHAKE, 3, 1, 0x40, 1][..], &hello].concat(),
        record(HANDSHAKE, &[2, 0, 0, 0]),
        record(HANDSHAKE, &[CLIENT_HELLO, 1, 0, 0]),
        [record(HANDSHAKE, &hello[..9]), record(ALERT, &[1, 0])].concat(),
        [record(HANDSHAKE, &hello[..9]), record(APPLICATION_DATA, &[1, 0])].concat(),
        // A second message behind the hello in one record, and a heartbeat behind it.
        record(HANDSHAKE, &[&hello[..], &[16, 0, 0, 0]].concat()),
        [whole.clone(), record(24, &[1, 0, 9])].concat(),
        [whole, vec![HANDSHAKE, 2, 0, 0, 1]].concat(),
    ];
    for (at, wire) in cases.iter().enumerate() {
        assert!(read_all([&wire[..]]).is_err(), "case {at}");
        assert!(read_all(wire.chunks(1)).is_err(), "case {at}");
    }
}

#[test]
fn large_hellos_are_read_and_their_limit_holds() {
    let padded = |bytes: usize| {
        hello_with(&[
            server_name_extension(&[(HOST_NAME, b"allowed.test")]),
            (0x1234, vec![0; bytes]),
        ])
    };
    for bytes in [2_000, 17_000, 60_000] {
        let wire = in_records(&padded(bytes), RECORD_BYTES_MAX);
        assert_eq!(name_of(&wire).unwrap(), "allowed.test");
    }
    // A message may say that it is longer than anything that is kept.
    let mut reader = Reader::default();
    let limit = u8::try_from(super::super::HELD_BYTES_MAX >> 16).unwrap();
    let endless = record(HANDSHAKE, &[CLIENT_HELLO, limit, 0, 0, 0]);
    assert_eq!(reader.read(&endless).unwrap_err().word(), "name_limit");
}

#[test]
fn changed_hellos_never_panic_and_pieces_make_no_difference() {
    let mut random = StdRng::seed_from_u64(7);
    let seeds: Vec<Vec<u8>> = all_recorded().into_iter().map(|(wire, _)| wire).collect();
    let mut read = 0;
    for round in 0..20_000 {
        let mut wire = seeds[round % seeds.len()].clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..wire.len());
            match random.random_range(0..4) {
                0 => wire[at] = random.random(),
                1 => wire[at] ^= 1 << random.random_range(0..8),
                2 => wire.truncate(at.max(1)),
                _ => wire.insert(at, random.random()),
            }
        }
        let whole = read_all([&wire[..]]);
        let mut pieces = Vec::new();
        let mut rest = &wire[..];
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(1 + usize::try_from(random.next_u32()).unwrap() % rest.len());
            pieces.push(piece);
            rest = after;
        }
        assert_eq!(whole, read_all(pieces), "{wire:02x?}");
        read += usize::from(matches!(whole.as_deref(), Ok([Reading::Hello(_), ..])));
    }
    // Changes in random values and keys leave a hello readable: both outcomes were met.
    assert!((1_000..19_000).contains(&read), "{read}");
}
