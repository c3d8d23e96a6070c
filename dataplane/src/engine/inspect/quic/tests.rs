//! First flights of QUIC clients: the published one, rustls' own, and those that are made to mislead.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::quic::{ClientConnection, Keys, Version};
use rustls::{ClientConfig, RootCertStore};

use super::super::tls::tests::{hello_with, server_name_extension};
use super::packet::{VERSION_1, VERSION_2};
use super::*;

const ID: &[u8] = &[0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];
const OTHER_ID: &[u8] = &[7; 8];

/// RFC 9001 appendix A.2, which RFC 9369 appendix A.2 shares: the CRYPTO frame of a client's hello.
const PUBLISHED_FRAME: &str = "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e868\
    04fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578\
    616d706c652e636f6dff01000100000a00080006001d00170018001000070005\
    04616c706e000500050100000000003300260024001d00209370b2c9caa47fba\
    baf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b000302030400\
    0d0010000e0403050306030203080408050806002d00020101001c0002400100\
    3900320408ffffffffffffffff05048000ffff07048000ffff08011001048000\
    75300901100f088394c8f03e51570806048000ffff";

fn unhex(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex
        .chars()
        .map(|c| u8::try_from(c.to_digit(16).unwrap()).unwrap())
        .collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// What a test's packet is made of.
#[derive(Clone, Copy)]
struct Made<'a> {
    version: u32,
    /// Where it goes, and the id of the keys.
    to: &'a [u8],
    keys: &'a [u8],
    token: &'a [u8],
    number: u32,
    /// The bit that RFC 9000 §17.2 wants to be set, and RFC 9287 lets be anything.
    fixed: bool,
}

const MADE: Made<'static> = Made {
    version: VERSION_1,
    to: ID,
    keys: ID,
    token: &[],
    number: 0,
    fixed: true,
};

fn varint(value: usize) -> [u8; 4] {
    (0x8000_0000 | u32::try_from(value).unwrap()).to_be_bytes()
}

/// An Initial packet with these frames, padded so that it is at least so long.
fn initial(made: Made<'_>, frames: &[u8], bytes: usize) -> Vec<u8> {
    let (version, bits) = match made.version {
        VERSION_2 => (Version::V2, 0xd3),
        _ => (Version::V1, 0xc3),
    };
    let suite = TLS13_AES_128_GCM_SHA256.tls13().unwrap().quic_suite().unwrap();
    let keys = Keys::initial(version, suite.suite, suite.quic, made.keys, rustls::Side::Client);
    let mut header = vec![if made.fixed { bits } else { bits & !0x40 }];
    header.extend_from_slice(&made.version.to_be_bytes());
    header.push(u8::try_from(made.to.len()).unwrap());
    header.extend_from_slice(made.to);
    header.push(0);
    if made.token.is_empty() {
        header.push(0);
    } else {
        header.extend_from_slice(&varint(made.token.len()));
        header.extend_from_slice(made.token);
    }
    let tag = keys.local.packet.tag_len();
    let overhead = header.len() + 2 + 4 + tag;
    let mut payload = frames.to_vec();
    payload.resize(frames.len().max(bytes.saturating_sub(overhead)).max(4), 0);
    let length = u16::try_from(4 + payload.len() + tag).unwrap();
    header.extend_from_slice(&(0x4000 | length).to_be_bytes());
    let number_at = header.len();
    header.extend_from_slice(&made.number.to_be_bytes());
    let sealed = keys
        .local
        .packet
        .encrypt_in_place(made.number.into(), &header, &mut payload)
        .unwrap();
    let mut packet = [&header[..], &payload, sealed.as_ref()].concat();
    let sample = packet[number_at + 4..number_at + 20].to_vec();
    let (first, rest) = packet.split_first_mut().unwrap();
    keys.local
        .header
        .encrypt_in_place(&sample, first, &mut rest[number_at - 1..number_at + 3])
        .unwrap();
    packet
}

fn crypto(offset: usize, data: &[u8]) -> Vec<u8> {
    [&[6], &varint(offset)[..], &varint(data.len()), data].concat()
}

fn hello(name: &str) -> Vec<u8> {
    hello_with(&[server_name_extension(&[(0, name.as_bytes())])])
}

/// An Initial packet of version 1 with a whole hello that names this.
pub(in crate::engine) fn initial_naming(name: &str) -> Vec<u8> {
    first_flight(MADE, name)
}

/// The same in two packets of a datagram each.
pub(in crate::engine) fn initials_naming(name: &str) -> [Vec<u8>; 2] {
    let hello = hello(name);
    let (first, second) = hello.split_at(20);
    let later = Made { number: 1, ..MADE };
    [
        initial(MADE, &crypto(0, first), INITIAL_DATAGRAM_BYTES_MIN),
        initial(later, &crypto(20, second), INITIAL_DATAGRAM_BYTES_MIN),
    ]
}

/// Whole hello in one datagram.
fn first_flight(made: Made<'_>, name: &str) -> Vec<u8> {
    initial(made, &crypto(0, &hello(name)), 1200)
}

/// An association, and what it asked about; `denied.test` is not agreed.
#[derive(Default)]
struct Watched {
    association: Association,
    asked: Vec<Option<String>>,
}

impl Watched {
    fn handle(&mut self, datagram: &[u8]) -> Result<Fate, InspectRefusal> {
        let asked = &mut self.asked;
        self.association.handle(datagram, &mut |hello| {
            asked.push(hello.name.as_ref().map(ToString::to_string));
            match &hello.name {
                Some(name) if name.as_str() != "denied.test" => Ok(()),
                Some(name) => Err(InspectRefusal::Mismatch {
                    spoken: Spoken::Quic,
                    name: name.clone(),
                    port: 443,
                }),
                None => Err(InspectRefusal::Missing(Spoken::Quic)),
            }
        })
    }

    fn agreed(name: &str) -> Self {
        let mut watched = Self::default();
        assert_eq!(watched.handle(&first_flight(MADE, name)), Ok(Fate::Pass));
        watched
    }
}

#[test]
fn the_published_initial_packets_are_read() {
    for (version, bits, protected) in [
        (VERSION_1, 0xc3, "c000000001088394c8f03e5157080000449e7b9aec34"),
        (VERSION_2, 0xd3, "d76b3343cf088394c8f03e5157080000449ea0c95e82"),
    ] {
        let made = Made {
            version,
            number: 2,
            ..MADE
        };
        let packet = initial(made, &unhex(PUBLISHED_FRAME), 1200);
        if version == VERSION_1 {
            // As RFC 9001 prints it, whole.
            assert_eq!(packet, unhex(&include_str!("rfc9001-a2.hex").replace('\n', "")));
        }
        assert_eq!(packet.len(), 1200);
        // The published bytes: so what the test makes is what the documents mean.
        assert_eq!(packet[..22], unhex(protected));
        assert_eq!(packet[0] & 0xb0, bits & 0xb0);
        let mut watched = Watched::default();
        assert_eq!(watched.handle(&packet), Ok(Fate::Pass));
        assert_eq!(watched.asked, [Some("example.com".to_owned())]);
    }
}

#[test]
fn the_hello_of_a_real_client_is_read_from_one_packet_or_many_in_any_order() {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = (0..40)
        .map(|i| format!("protocol-{i:050}").into_bytes())
        .collect();
    let name = "api.example.test".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(config), Version::V1, name, vec![0, 1, 2]).unwrap();
    let mut hello = Vec::new();
    client.write_hs(&mut hello);
    assert!(hello.len() > 2_400, "{}", hello.len());

    let mut random = StdRng::seed_from_u64(3);
    for pieces in [3, 4, 9, 14] {
        let mut frames: Vec<(usize, &[u8])> = hello
            .chunks(hello.len().div_ceil(pieces))
            .scan(0, |offset, piece| {
                let at = *offset;
                *offset += piece.len();
                Some((at, piece))
            })
            .collect();
        for at in (1..frames.len()).rev() {
            frames.swap(at, random.random_range(0..=at));
        }
        let mut watched = Watched::default();
        let mut sent = Vec::new();
        for (number, (offset, piece)) in frames.iter().enumerate() {
            // With a PING before and padding behind, as clients scatter them.
            let frames = [&[1, 0, 0], &crypto(*offset, piece)[..]].concat();
            let made = Made {
                number: u32::try_from(number).unwrap(),
                ..MADE
            };
            let datagram = initial(made, &frames, 1200);
            let fate = watched.handle(&datagram).unwrap();
            if number + 1 < pieces {
                assert_eq!(fate, Fate::Held);
                assert!(watched.asked.is_empty() && watched.association.is_holding());
                sent.push(datagram);
            } else {
                assert_eq!(fate, Fate::Pass);
            }
        }
        assert_eq!(watched.asked, [Some("api.example.test".to_owned())]);
        let released = watched.association.take_released();
        assert!(sent.iter().map(|d| &d[..]).eq(released.iter().map(|d| &d[..])));
        assert!(!watched.association.is_holding() && watched.association.held_bytes == 0);
    }
}

#[test]
fn coalesced_packets_tokens_and_both_versions_are_read() {
    for version in [VERSION_1, VERSION_2] {
        let hello = hello("allowed.test");
        let (one, two) = hello.split_at(30);
        let made = Made {
            version,
            token: &[9; 70],
            ..MADE
        };
        let first = initial(made, &crypto(0, one), 0);
        let second = initial(Made { number: 1, ..made }, &crypto(30, two), 1200 - first.len());
        let mut watched = Watched::default();
        assert_eq!(watched.handle(&[first, second].concat()), Ok(Fate::Pass));
        assert_eq!(watched.asked, [Some("allowed.test".to_owned())]);
    }
}

#[test]
fn a_hello_for_another_name_or_for_none_is_refused() {
    let refusal = Watched::default().handle(&first_flight(MADE, "denied.test"));
    assert_eq!(refusal.unwrap_err().word(), "name_mismatch");
    let nameless = initial(MADE, &crypto(0, &hello_with(&[])), 1200);
    assert_eq!(
        Watched::default().handle(&nameless).unwrap_err().word(),
        "name_missing"
    );
}

#[test]
fn what_cannot_be_read_is_refused_before_a_hello_and_dropped_after_one() {
    let flight = first_flight(MADE, "allowed.test");
    let changed = |at: usize, byte: u8| {
        let mut datagram = flight.clone();
        datagram[at] = byte;
        datagram
    };
    let mut greased = flight.clone();
    greased[1..5].copy_from_slice(&[0x0a, 0x1a, 0x2a, 0x3a]);
    let mut negotiation = flight.clone();
    negotiation[1..5].fill(0);
    let cases = [
        greased,
        negotiation,
        changed(0, flight[0] & !0x40),
        // Retry, another key, a broken tag, a short id.
        changed(0, flight[0] | 0x30),
        changed(8, !flight[8]),
        changed(1199, !flight[1199]),
        initial(
            Made {
                to: &[],
                keys: OTHER_ID,
                ..MADE
            },
            &crypto(0, &hello("allowed.test")),
            1200,
        ),
        flight[..1199].to_vec(),
        initial(MADE, &crypto(0, &hello("allowed.test")), 600),
        // Frames that are not an Initial's, or cut short.
        initial(Made { number: 1, ..MADE }, &[8, 0, 0], 1200),
        initial(Made { number: 1, ..MADE }, &[0x1c, 0, 0, 0x7f], 1200),
    ];
    for (at, datagram) in cases.iter().enumerate() {
        assert!(Watched::default().handle(datagram).is_err(), "case {at}");
        let mut watched = Watched::agreed("allowed.test");
        assert_eq!(watched.handle(datagram), Ok(Fate::Drop), "case {at}");
        assert_eq!(watched.asked.len(), 1);
    }
}

#[test]
fn a_connection_that_moved_here_has_no_initial_and_is_refused() {
    for datagram in [&[0x43; 60][..], &[0x43], &[0]] {
        assert!(Watched::default().handle(datagram).is_err());
        assert_eq!(Watched::agreed("allowed.test").handle(datagram), Ok(Fate::Pass));
    }
    assert!(Watched::default().handle(&[]).is_err());
}

#[test]
fn later_packets_of_an_agreed_connection_pass() {
    let mut watched = Watched::agreed("allowed.test");
    // To an id that the server chose, under the first keys; an acknowledgement.
    let later = Made {
        to: &[1, 2, 3],
        number: 3,
        ..MADE
    };
    let acknowledgement = [2, 0, 0, 1, 0, 0, 0];
    assert_eq!(
        watched.handle(&initial(later, &acknowledgement, 1200)),
        Ok(Fate::Pass)
    );
    // The server chose version 2 (RFC 9368): the keys are of that version and the first id.
    let upgraded = Made {
        version: VERSION_2,
        ..later
    };
    let with_counts = [3, 0, 0, 0, 0, 1, 2, 3];
    assert_eq!(
        watched.handle(&initial(upgraded, &with_counts, 1200)),
        Ok(Fate::Pass)
    );
    // After a Retry: everything anew, under the id that the server chose.
    let retried = Made {
        to: &[5; 4],
        keys: &[5; 4],
        token: &[1; 30],
        number: 4,
        ..MADE
    };
    assert_eq!(
        watched.handle(&first_flight(retried, "allowed.test")),
        Ok(Fate::Pass)
    );
    // The hello again, because an answer was lost.
    assert_eq!(
        watched.handle(&first_flight(Made { number: 9, ..MADE }, "allowed.test")),
        Ok(Fate::Pass)
    );
    assert_eq!(watched.asked.len(), 2);
}

#[test]
fn a_second_connection_of_the_association_is_asked_about_too() {
    let other = Made {
        to: OTHER_ID,
        keys: OTHER_ID,
        ..MADE
    };
    let mut watched = Watched::agreed("allowed.test");
    assert_eq!(watched.handle(&first_flight(other, "also.test")), Ok(Fate::Pass));
    let mut watched = Watched::agreed("allowed.test");
    let refusal = watched.handle(&first_flight(other, "denied.test"));
    assert_eq!(refusal.unwrap_err().word(), "name_mismatch");
    // While its hello is not whole, its packets wait and others' pass.
    let mut watched = Watched::agreed("allowed.test");
    let hello = hello("also.test");
    let part = initial(other, &crypto(0, &hello[..20]), 1200);
    assert_eq!(watched.handle(&part), Ok(Fate::Held));
    assert_eq!(watched.handle(&[0x43; 50]), Ok(Fate::Pass));
    assert!(watched.association.take_released().is_empty());
    let rest = initial(Made { number: 1, ..other }, &crypto(20, &hello[20..]), 1200);
    assert_eq!(watched.handle(&rest), Ok(Fate::Pass));
    assert_eq!(watched.association.take_released(), [part.into_boxed_slice()]);
}

#[test]
fn a_second_hello_on_one_connection_is_asked_about_too() {
    let first = hello("allowed.test");
    let second = hello("denied.test");
    let mut watched = Watched::agreed("allowed.test");
    let asked_for = initial(Made { number: 1, ..MADE }, &crypto(first.len(), &second), 1200);
    assert_eq!(watched.handle(&asked_for).unwrap_err().word(), "name_mismatch");
}

#[test]
fn a_hello_that_says_two_things_in_one_place_is_refused() {
    let one = hello("allowed.test");
    let other = hello("refused.test");
    let mut watched = Watched::default();
    assert_eq!(
        watched.handle(&initial(MADE, &crypto(0, &one[..one.len() - 1]), 1200)),
        Ok(Fate::Held)
    );
    let conflicting = initial(Made { number: 1, ..MADE }, &crypto(0, &other), 1200);
    assert!(watched.handle(&conflicting).is_err());
    // After it was agreed, such a packet goes nowhere.
    let mut watched = Watched::agreed("allowed.test");
    assert_eq!(watched.handle(&conflicting), Ok(Fate::Drop));
}

#[test]
fn early_data_waits_with_its_hello() {
    let mut early = vec![0xd3, 0, 0, 0, 1, 8];
    early.extend_from_slice(ID);
    early.extend_from_slice(&[0, 0x40, 60]);
    early.extend_from_slice(&[1; 60]);
    assert!(Watched::default().handle(&early).is_err());
    let hello = hello("allowed.test");
    let mut watched = Watched::default();
    let first = initial(MADE, &crypto(0, &hello[..40]), 1200);
    assert_eq!(watched.handle(&first), Ok(Fate::Held));
    assert_eq!(watched.handle(&early), Ok(Fate::Held));
    let rest = initial(Made { number: 1, ..MADE }, &crypto(40, &hello[40..]), 1200);
    assert_eq!(watched.handle(&rest), Ok(Fate::Pass));
    assert_eq!(
        watched.association.take_released(),
        [first.into_boxed_slice(), early.clone().into_boxed_slice()]
    );
    assert_eq!(watched.handle(&early), Ok(Fate::Pass));
    // Of a connection that nobody began.
    early[6] ^= 1;
    assert_eq!(watched.handle(&early), Ok(Fate::Drop));
}

#[test]
fn limits_hold() {
    let hello = hello("allowed.test");
    // Datagrams.
    let mut watched = Watched::default();
    let ping = |number| initial(Made { number, ..MADE }, &[1], 1200);
    for number in 0..HELD_DATAGRAMS_MAX {
        assert_eq!(
            watched.handle(&ping(u32::try_from(number).unwrap())),
            Ok(Fate::Held)
        );
    }
    assert_eq!(watched.handle(&ping(99)).unwrap_err().word(), "name_limit");
    // Bytes held.
    let mut watched = Watched::default();
    let large = initial(MADE, &[1], 9_000);
    for _ in 0..HELD_BYTES_MAX / 9_000 {
        assert_eq!(watched.handle(&large), Ok(Fate::Held));
    }
    assert_eq!(watched.handle(&large).unwrap_err().word(), "name_limit");
    // The hello's bytes, and its pieces.
    let far = initial(MADE, &crypto(super::super::HELD_BYTES_MAX, b"a"), 1200);
    assert_eq!(Watched::default().handle(&far).unwrap_err().word(), "name_limit");
    let mut beyond = vec![6];
    beyond.extend_from_slice(&[0xff; 8]);
    beyond.extend_from_slice(&[1, 0]);
    assert_eq!(
        Watched::default()
            .handle(&initial(MADE, &beyond, 1200))
            .unwrap_err()
            .word(),
        "name_limit"
    );
    let pieces = |count: usize| -> Vec<u8> { (0..count).flat_map(|at| crypto(2 * at, &[1])).collect() };
    let most = initial(MADE, &pieces(PIECES_MAX), 1200);
    assert_eq!(Watched::default().handle(&most), Ok(Fate::Held));
    let more = initial(MADE, &pieces(PIECES_MAX + 1), 1200);
    assert_eq!(Watched::default().handle(&more).unwrap_err().word(), "name_limit");
    // Connections that do not finish their hello.
    let mut watched = Watched::default();
    let begin = |id: &[u8]| {
        let made = Made {
            to: id,
            keys: id,
            ..MADE
        };
        initial(made, &crypto(0, &hello[..9]), 1200)
    };
    for id in 0..u8::try_from(CONNECTIONS_MAX).unwrap() {
        assert_eq!(watched.handle(&begin(&[id; 8])), Ok(Fate::Held));
    }
    assert_eq!(watched.handle(&begin(&[99; 8])).unwrap_err().word(), "name_limit");
    // Those that did make room.
    let mut watched = Watched::default();
    for id in 0..20 {
        let made = Made {
            to: &[id; 8],
            keys: &[id; 8],
            ..MADE
        };
        assert_eq!(
            watched.handle(&first_flight(made, "allowed.test")),
            Ok(Fate::Pass)
        );
    }
    assert_eq!(watched.association.connections.len(), CONNECTIONS_MAX);
}

#[test]
fn changed_packets_and_frames_never_panic() {
    let mut random = StdRng::seed_from_u64(5);
    let mut kept = Watched::agreed("allowed.test");
    for round in 0..4_000u32 {
        // Frames of noise, sealed properly, so that the noise is read.
        let mut frames = crypto(0, &hello("allowed.test"));
        frames.extend_from_slice(&[2, 0, 0, 1, 0, 0, 0]);
        for _ in 0..random.random_range(0..4) {
            let at = random.random_range(0..frames.len());
            frames[at] = random.random();
        }
        let mut datagram = initial(
            Made {
                number: round,
                ..MADE
            },
            &frames,
            1200,
        );
        let _ = Watched::default().handle(&datagram);
        let _ = kept.handle(&datagram);
        // And the packet itself.
        let at = random.random_range(0..40);
        datagram[at] = random.random();
        datagram.truncate(random.random_range(0..=1300).min(datagram.len()));
        let _ = Watched::default().handle(&datagram);
        let _ = kept.handle(&datagram);
        let noise: Vec<u8> = (0..random.random_range(0..60)).map(|_| random.random()).collect();
        let _ = Watched::default().handle(&noise);
    }
    assert!(kept.association.connections.len() <= CONNECTIONS_MAX);
    assert!(kept.association.held_bytes <= HELD_BYTES_MAX);
}

#[test]
fn what_a_server_may_take_for_an_initial_packet_looks_like_one() {
    let cleared = Made { fixed: false, ..MADE };
    let wire = initial(
        cleared,
        &crypto(0, &hello("allowed.test")),
        INITIAL_DATAGRAM_BYTES_MIN,
    );
    assert_eq!(wire[0] & 0x40, 0);
    assert!(looks_like_initial(&wire));
    let mut watched = Watched::default();
    assert_eq!(watched.handle(&wire), Ok(Fate::Pass));
    assert_eq!(watched.asked.len(), 1, "its name was read");

    let of_version = |version: u32, bytes: usize| {
        let mut wire = wire.clone();
        wire[1..5].copy_from_slice(&version.to_be_bytes());
        wire.truncate(bytes);
        looks_like_initial(&wire)
    };
    for version in [
        0,
        0xff00_001d,
        0x0a1a_2a3a,
        u32::from_be_bytes(*b"Q050"),
        u32::from_be_bytes(*b"T051"),
    ] {
        assert!(of_version(version, 1200), "{version:08x}");
        assert!(
            !of_version(version, 1199),
            "{version:08x}: no client sends so little"
        );
    }
    assert!(!of_version(0x1234_5678, 1200), "some other protocol's bytes");
}
