//! Messages at the byte: what is read from clients, what upstream answers become.

use hickory_proto::rr::rdata::{CNAME, TXT};
use hickory_proto::rr::{Name as WireName, RData};

use super::*;

fn wire(name: &str) -> WireName {
    WireName::from_ascii(name).unwrap()
}

fn query(name: &str, kind: RecordType, edns: Option<(u16, bool)>) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(wire(name), kind));
    if let Some((payload, dnssec_ok)) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        edns.set_dnssec_ok(dnssec_ok);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

fn upstream(question: &Question, change: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::response(0x7777, OpCode::Query);
    message.metadata.recursion_available = true;
    message.add_query(Query::read(&mut BinDecoder::new(&question.wire)).unwrap());
    change(&mut message);
    message.to_vec().unwrap()
}

fn code_of(refusal: Result<Question, Refusal>) -> ResponseCode {
    match refusal {
        Err(Refusal::Answered(bytes)) => {
            let message = Message::from_vec(&bytes).unwrap();
            assert_eq!(
                (message.metadata.id, message.metadata.message_type),
                (0x1234, MessageType::Response)
            );
            message.metadata.response_code
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_query_is_read_with_its_case_and_its_wishes() {
    let question = read_query(&query("WwW.Example.COM.", RecordType::HTTPS, Some((4096, true)))).unwrap();
    assert_eq!(question.name.as_ref().unwrap().as_str(), "www.example.com");
    assert_eq!(question.wire, b"\x03WwW\x07Example\x03COM\x00\x00\x41\x00\x01");
    assert_eq!(question.query_type, 65);
    assert_eq!(
        question.edns,
        Some(ClientEdns {
            udp_bytes: UDP_BYTES_MAX,
            dnssec_ok: true
        })
    );
    let small = read_query(&query("a.test.", RecordType::A, Some((100, false)))).unwrap();
    assert_eq!(
        small.edns.unwrap().udp_bytes,
        UDP_BYTES_PLAIN,
        "RFC 6891: less than 512 is 512"
    );
}

#[test]
fn what_is_not_one_question_of_class_in_gets_no_further() {
    assert_eq!(read_query(b"short"), Err(Refusal::Ignored));
    let good = query("a.test.", RecordType::A, None);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        read_query(&bytes)
    };
    assert_eq!(with(&|b| b[2] |= 0x80), Err(Refusal::Ignored), "a response");
    assert_eq!(code_of(with(&|b| b[2] |= 5 << 3)), ResponseCode::NotImp);
    assert_eq!(code_of(with(&|b| b[5] = 0)), ResponseCode::FormErr);
    assert_eq!(code_of(with(&|b| b[5] = 2)), ResponseCode::FormErr);
    assert_eq!(code_of(with(&|b| b.truncate(14))), ResponseCode::FormErr);
    assert_eq!(
        code_of(with(&|b| b[12] = 0xc0)),
        ResponseCode::FormErr,
        "a pointer in a question"
    );
    assert_eq!(
        code_of(with(&|b| *b.last_mut().unwrap() = 3)),
        ResponseCode::Refused,
        "class CHAOS"
    );
    assert_eq!(
        code_of(read_query(&query("a.test.", RecordType::AXFR, None))),
        ResponseCode::NotImp
    );
    let mut version = query("a.test.", RecordType::A, Some((1232, false)));
    let at = version.len() - 5;
    version[at] = 1;
    assert_eq!(
        code_of(read_query(&version)),
        ResponseCode::BADSIG,
        "16 is BADVERS in an OPT record; hickory reads it so"
    );
}

#[test]
fn errors_carry_their_reason_only_to_clients_that_take_it() {
    let why = ExtendedError::new(ExtendedError::BLOCKED, "é".repeat(200));
    let plain = read_query(&query("a.test.", RecordType::A, None)).unwrap();
    let message = Message::from_vec(&plain.error(ResponseCode::Refused, Some(&why))).unwrap();
    assert!(message.edns.is_none());
    assert!(message.metadata.recursion_desired && message.metadata.recursion_available);
    let question = read_query(&query("a.test.", RecordType::A, Some((1232, true)))).unwrap();
    let bytes = question.error(ResponseCode::Refused, Some(&why));
    assert!(bytes.len() < UDP_BYTES_PLAIN);
    let edns = Message::from_vec(&bytes).unwrap().edns.unwrap();
    let Some(EdnsOption::Unknown(15, data)) = edns.options().get(EXTENDED_ERROR.into()) else {
        panic!("{edns:?}")
    };
    assert_eq!(data[..2], [0, 15]);
    assert_eq!(
        std::str::from_utf8(&data[2..]).unwrap(),
        "é".repeat(80),
        "cut between characters"
    );
    assert!(edns.flags().dnssec_ok);
}

#[test]
fn the_upstream_is_asked_the_same_with_an_opt_record_of_our_own() {
    let mut bytes = query("WwW.test.", RecordType::Unknown(65_280), Some((4096, true)));
    bytes[3] |= 0x30;
    let question = read_query(&bytes).unwrap();
    let asked = question.upstream_query();
    let small = question.wire.to_ascii_lowercase();
    assert_eq!(question_of(&asked), Some(&small[..]));
    let message = Message::from_vec(&asked).unwrap();
    assert!(
        message.metadata.recursion_desired
            && message.metadata.checking_disabled
            && message.metadata.authentic_data
    );
    let edns = message.edns.unwrap();
    assert_eq!(
        (edns.max_payload(), edns.flags().dnssec_ok, edns.version()),
        (1232, true, 0)
    );
    let plain = read_query(&query("a.test.", RecordType::A, None)).unwrap();
    assert!(
        !Message::from_vec(&plain.upstream_query())
            .unwrap()
            .edns
            .unwrap()
            .flags()
            .dnssec_ok
    );
}

#[test]
fn an_answer_is_relayed_byte_for_byte_but_for_id_case_and_opt() {
    let question = read_query(&query("A.tEsT.", RecordType::Unknown(65_280), None)).unwrap();
    let mut raw =
        b"\x77\x77\x85\xa0\x00\x01\x00\x01\x00\x00\x00\x01\x01a\x04test\x00\xff\x00\x00\x01".to_vec();
    raw.extend_from_slice(b"\xc0\x0c\xff\x00\x00\x01\x00\x00\x00\x07\x00\x03\x01\x02\x03");
    let body = raw.len();
    raw.extend_from_slice(b"\x00\x00\x29\x10\x00\x00\x00\x80\x00\x00\x00");
    let relayed = question.relay(&Upstream::read(&raw).unwrap(), Some(512)).unwrap();
    let mut expected = raw[..body].to_vec();
    expected[..2].copy_from_slice(&[0x12, 0x34]);
    expected[11] = 0;
    expected[12..20].copy_from_slice(b"\x01A\x04tEsT\x00");
    assert_eq!(
        relayed,
        Relayed {
            bytes: expected,
            truncated: false
        }
    );
    assert_eq!(relayed.bytes[3] & 0x20, 0x20, "AD passes");
}

#[test]
fn the_opt_record_is_exchanged_and_extended_errors_and_codes_pass() {
    let question = read_query(&query("a.test.", RecordType::A, Some((1232, true)))).unwrap();
    let raw = upstream(&question, |m| {
        m.metadata.response_code = ResponseCode::BADCOOKIE;
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        edns.options_mut().insert(EdnsOption::Unknown(10, vec![1; 8]));
        edns.options_mut()
            .insert(EdnsOption::Unknown(15, b"\x00\x06bogus".to_vec()));
        m.set_edns(edns);
    });
    let answer = Upstream::read(&raw).unwrap();
    assert_eq!(answer.code(), 23);
    let relayed = Message::from_vec(&question.relay(&answer, None).unwrap().bytes).unwrap();
    assert_eq!(relayed.metadata.response_code, ResponseCode::BADCOOKIE);
    let edns = relayed.edns.unwrap();
    assert_eq!((edns.max_payload(), edns.flags().dnssec_ok), (1232, true));
    assert!(
        edns.options().get(10.into()).is_none(),
        "what is the upstream's link's stays there"
    );
    assert!(edns.options().get(15.into()).is_some());
    let plain = read_query(&query("a.test.", RecordType::A, None)).unwrap();
    assert!(
        plain.relay(&answer, None).is_none(),
        "cannot be said without an OPT record"
    );
}

#[test]
fn what_does_not_fit_is_cut_to_nothing_with_tc() {
    let question = read_query(&query("a.test.", RecordType::TXT, Some((600, false)))).unwrap();
    let raw = upstream(&question, |m| {
        for n in 0..10 {
            let text = TXT::new(vec![format!("{n}").repeat(100)]);
            m.add_answer(Record::from_rdata(wire("a.test."), 60, RData::TXT(text)));
        }
    });
    let answer = Upstream::read(&raw).unwrap();
    let cut = question.relay(&answer, Some(600)).unwrap();
    assert!(cut.truncated);
    let message = Message::from_vec(&cut.bytes).unwrap();
    assert!(message.metadata.truncation && message.answers.is_empty() && message.edns.is_some());
    let whole = question.relay(&answer, None).unwrap();
    assert!(!whole.truncated);
    assert_eq!(Message::from_vec(&whole.bytes).unwrap().answers.len(), 10);
}

#[test]
fn only_an_answer_to_the_same_question_is_one() {
    let question = read_query(&query("a.test.", RecordType::A, None)).unwrap();
    for other in [
        query("b.test.", RecordType::A, None),
        query("a.test.", RecordType::AAAA, None),
    ] {
        let other = read_query(&other).unwrap();
        let raw = upstream(&other, |_| ());
        assert!(question.relay(&Upstream::read(&raw).unwrap(), None).is_none());
    }
    let raw = upstream(
        &read_query(&query("A.TEST.", RecordType::A, None)).unwrap(),
        |_| (),
    );
    assert!(
        question.relay(&Upstream::read(&raw).unwrap(), None).is_some(),
        "but for case"
    );
    assert!(
        Upstream::read(&question.upstream_query()).is_none(),
        "a query is no answer"
    );
}

#[test]
fn addresses_are_those_at_the_end_of_the_aliases() {
    let question = read_query(&query("www.test.", RecordType::A, None)).unwrap();
    let address = |name: &str, last: u8, ttl| {
        Record::from_rdata(
            wire(name),
            ttl,
            RData::A(std::net::Ipv4Addr::new(203, 0, 113, last).into()),
        )
    };
    let alias =
        |name: &str, to: &str, ttl| Record::from_rdata(wire(name), ttl, RData::CNAME(CNAME(wire(to))));
    let name = question.name.clone().unwrap();
    let find = |records: Vec<Record>| {
        let raw = upstream(&question, |m| {
            m.add_answers(records);
        });
        Upstream::read(&raw).unwrap().addresses_of(&name)
    };
    let (found, ttl) = find(vec![
        alias("CDN.test.", "edge.test.", 20),
        address("edge.test.", 1, 300),
        address("edge.test.", 2, 300),
        address("bystander.test.", 9, 300),
        alias("www.test.", "cdn.test.", 600),
    ]);
    assert_eq!(
        found,
        [IpAddr::from([203, 0, 113, 1]), IpAddr::from([203, 0, 113, 2])]
    );
    assert_eq!(ttl, Duration::from_secs(20), "the shortest on the way");
    assert!(
        find(vec![
            alias("www.test.", "x.test.", 1),
            alias("x.test.", "www.test.", 1)
        ])
        .0
        .is_empty(),
        "a loop"
    );
    let long = (0..30).map(|n| {
        let from = if n == 0 {
            "www.test.".to_owned()
        } else {
            format!("n{n}.test.")
        };
        alias(&from, &format!("n{}.test.", n + 1), 1)
    });
    assert!(
        find(long.chain([address("n30.test.", 1, 1)]).collect())
            .0
            .is_empty(),
        "a chain without end"
    );
}

#[test]
fn every_name_that_an_answer_leads_through_is_an_alias() {
    let question = read_query(&query("www.test.", RecordType::A, None)).unwrap();
    let alias = |name: &str, to: &str| Record::from_rdata(wire(name), 60, RData::CNAME(CNAME(wire(to))));
    let name = question.name.clone().unwrap();
    let find = |records: Vec<Record>, code| {
        let raw = upstream(&question, |m| {
            m.metadata.response_code = code;
            m.add_answers(records);
        });
        let aliases = Upstream::read(&raw).unwrap().aliases_of(&name)?;
        Some(aliases.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let found = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect());
    // In any order, whatever the case, and nothing that it does not lead to.
    let chain = vec![
        alias("CDN.test.", "edge.test."),
        alias("other.test.", "bystander.test."),
        alias("www.test.", "Cdn.test."),
    ];
    for code in [ResponseCode::NoError, ResponseCode::NXDomain] {
        assert_eq!(find(chain.clone(), code), found(&["cdn.test", "edge.test"]));
    }
    // A name may not have two aliases; whoever reads the second is led through it.
    let two = vec![alias("www.test.", "a.test."), alias("www.test.", "b.test.")];
    assert_eq!(find(two, ResponseCode::NoError), found(&["a.test", "b.test"]));
    let looped = vec![alias("www.test.", "x.test."), alias("x.test.", "www.test.")];
    assert_eq!(find(looped, ResponseCode::NoError), found(&["x.test"]));
    assert_eq!(find(Vec::new(), ResponseCode::NoError), found(&[]));
    let long = |length: usize| {
        let names: Vec<String> = std::iter::once("www.test.".to_owned())
            .chain((1..=length).map(|n| format!("n{n}.test.")))
            .collect();
        let pairs = names.windows(2).map(|pair| alias(&pair[0], &pair[1]));
        find(pairs.collect(), ResponseCode::NoError).map(|aliases| aliases.len())
    };
    assert_eq!(long(ALIASES_MAX), Some(ALIASES_MAX));
    assert_eq!(long(ALIASES_MAX + 1), None);
}

#[test]
fn no_bytes_make_it_panic() {
    let question = read_query(&query("www.test.", RecordType::A, Some((1232, true)))).unwrap();
    let good = upstream(&question, |m| {
        m.add_answer(Record::from_rdata(
            wire("www.test."),
            60,
            RData::CNAME(CNAME(wire("a.test."))),
        ));
        m.add_answer(Record::from_rdata(
            wire("a.test."),
            60,
            RData::A("203.0.113.1".parse().unwrap()),
        ));
        m.set_edns(question.own_edns());
    });
    let asked = query("www.test.", RecordType::A, Some((1232, true)));
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    for _ in 0..30_000 {
        for sample in [&good, &asked] {
            let mut bytes = sample.clone();
            for _ in 0..random(6) {
                let at = random(bytes.len());
                bytes[at] = u8::try_from(random(256)).unwrap();
            }
            bytes.truncate(random(bytes.len() * 2));
            if let Some(answer) = Upstream::read(&bytes) {
                answer.addresses_of(question.name.as_ref().unwrap());
                answer.aliases_of(question.name.as_ref().unwrap());
                if let Some(relayed) = question.relay(&answer, Some(512)) {
                    assert!(relayed.bytes.len() <= 512);
                }
            }
            if let Ok(read) = read_query(&bytes) {
                assert!(question_of(&read.upstream_query()).is_some());
                assert!(!read.error(ResponseCode::Refused, None).is_empty());
            }
        }
    }
}
