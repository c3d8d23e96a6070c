//! DNS messages as the gateway reads and writes them (RFC 1035, RFC 6891, RFC 8914).
//!
//! Queries are read, and the gateway's own answers written, by `hickory-proto`. What an upstream answers
//! is not written anew: its bytes go to the guest with only the id, the case of the question and the OPT
//! record replaced, so that record types nobody here knows pass unchanged.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use vnet_proto::model::Name;

use crate::engine::synthetic::table::ANSWER_TTL;

/// The largest UDP answer that is sent or asked for, bytes: no fragments on any path (DNS flag day 2020).
pub const UDP_BYTES_MAX: usize = 1_232;
/// The largest UDP answer to a client that does not say what it takes (RFC 1035 §4.2.1).
pub const UDP_BYTES_PLAIN: usize = 512;
/// Aliases followed from the name that was asked for to its addresses.
pub const ALIASES_MAX: usize = 16;
/// Bytes of text in an extended error, so that an error fits every answer.
const ERROR_TEXT_BYTES_MAX: usize = 160;
const HEADER_BYTES: usize = 12;
const OPT: u16 = 41;
/// The option that carries an extended error (RFC 8914 §2).
const EXTENDED_ERROR: u16 = 15;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The id to answer with.
    pub id: u16,
    /// The question as it came: name in the client's case, type, class.
    pub wire: Vec<u8>,
    /// The name for comparing; `None` for the root.
    pub name: Option<Name>,
    /// The record type's number.
    pub query_type: u16,
    /// Recursion is desired.
    pub recursion_desired: bool,
    /// Checking is disabled: upstream shall not validate (RFC 4035 §3.2.2).
    pub checking_disabled: bool,
    /// The client understands the AD bit (RFC 6840 §5.7).
    pub authentic_data: bool,
    /// What the client says in its OPT record, if it has one.
    pub edns: Option<ClientEdns>,
}

/// The part of a client's OPT record that is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientEdns {
    /// The largest UDP answer it takes, bytes.
    pub udp_bytes: usize,
    /// It wants DNSSEC records.
    pub dnssec_ok: bool,
}

/// A message that gets no verdict.
#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not even a query's header, or a response: nothing is said.
    Ignored,
    /// Answered at once with these bytes.
    Answered(Vec<u8>),
}

/// The code and text of an extended error (RFC 8914 §4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtendedError {
    /// What kind.
    pub code: u16,
    /// For people.
    pub text: String,
}

impl ExtendedError {
    /// None of the other codes.
    pub const OTHER: u16 = 0;
    /// Blocked by the operator.
    pub const BLOCKED: u16 = 15;
    /// Filtered at the client's own request.
    pub const FILTERED: u16 = 17;
    /// The server will not do this for this client.
    pub const PROHIBITED: u16 = 18;
    /// No upstream could be reached.
    pub const NETWORK_ERROR: u16 = 23;

    /// From its parts.
    pub fn new(code: u16, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }

    fn option(&self) -> EdnsOption {
        let mut data = self.code.to_be_bytes().to_vec();
        let end = (0..=ERROR_TEXT_BYTES_MAX.min(self.text.len()))
            .rev()
            .find(|at| self.text.is_char_boundary(*at));
        data.extend_from_slice(&self.text.as_bytes()[..end.unwrap_or(0)]);
        EdnsOption::Unknown(EXTENDED_ERROR, data)
    }
}

/// Reads a client's message.
///
/// # Errors
/// [`Refusal`] for everything but one question of class IN.
pub fn read_query(bytes: &[u8]) -> Result<Question, Refusal> {
    let Some((header, _)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(Refusal::Ignored);
    };
    let (id, flags) = (u16_at(header, 0).unwrap_or_default(), header[2]);
    if flags & 0x80 != 0 {
        return Err(Refusal::Ignored);
    }
    let op_code = OpCode::from_u8(flags >> 3 & 0xf);
    let refuse = |code| Refusal::Answered(encode(Message::error_msg(id, op_code, code)));
    if flags >> 3 & 0xf != 0 {
        return Err(refuse(ResponseCode::NotImp));
    }
    let message = Message::from_vec(bytes).map_err(|_| refuse(ResponseCode::FormErr))?;
    let end = uncompressed_name_end(bytes, HEADER_BYTES).map(|end| end + 4);
    let ([query], Some(wire)) = (
        &message.queries[..],
        end.and_then(|end| bytes.get(HEADER_BYTES..end)),
    ) else {
        return Err(refuse(ResponseCode::FormErr));
    };
    let name = query.name.iter().len() > 0;
    let name = match name.then(|| Name::from_labels(query.name.iter())).transpose() {
        Ok(name) => name,
        Err(_) => return Err(refuse(ResponseCode::FormErr)),
    };
    let question = Question {
        id,
        wire: wire.to_vec(),
        name,
        query_type: query.query_type.into(),
        recursion_desired: message.metadata.recursion_desired,
        checking_disabled: message.metadata.checking_disabled,
        authentic_data: message.metadata.authentic_data,
        edns: message.edns.as_ref().map(|edns| ClientEdns {
            udp_bytes: usize::from(edns.max_payload()).clamp(UDP_BYTES_PLAIN, UDP_BYTES_MAX),
            dnssec_ok: edns.flags().dnssec_ok,
        }),
    };
    if message.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        return Err(Refusal::Answered(question.error(ResponseCode::BADVERS, None)));
    }
    if query.query_class != DNSClass::IN {
        return Err(Refusal::Answered(question.error(ResponseCode::Refused, None)));
    }
    if matches!(query.query_type, RecordType::AXFR | RecordType::IXFR) {
        // Not record types: their answers are whole zones in many messages.
        return Err(Refusal::Answered(question.error(ResponseCode::NotImp, None)));
    }
    Ok(question)
}

impl Question {
    /// The gateway's own answer with a code and nothing else, with an extended error for a client that takes one.
    pub fn error(&self, code: ResponseCode, why: Option<&ExtendedError>) -> Vec<u8> {
        let mut message = self.answer();
        message.metadata.response_code = code;
        if let (Some(edns), Some(why)) = (&mut message.edns, why) {
            edns.options_mut().insert(why.option());
        }
        encode(message)
    }

    /// The gateway's own answer with authority over the name.
    pub fn local_answer(
        &self,
        code: ResponseCode,
        answers: Vec<Record>,
        authority: Option<Record>,
    ) -> Vec<u8> {
        let mut message = self.answer();
        message.metadata.response_code = code;
        message.metadata.authoritative = true;
        message.add_answers(answers);
        message.add_authorities(authority);
        encode(message)
    }

    /// The answer that a name has this address; with `None`, that it has nothing of this type.
    pub fn synthetic_answer(&self, address: Option<IpAddr>) -> Vec<u8> {
        let mut message = self.answer();
        let owner = Query::read(&mut BinDecoder::new(&self.wire)).map(|query| query.name);
        if let (Some(address), Ok(owner)) = (address, owner) {
            let data = match address {
                IpAddr::V4(v4) => RData::A(v4.into()),
                IpAddr::V6(v6) => RData::AAAA(v6.into()),
            };
            let ttl = u32::try_from(ANSWER_TTL.as_secs()).unwrap_or(0);
            message.add_answers([Record::from_rdata(owner, ttl, data)]);
        }
        encode(message)
    }

    fn answer(&self) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.checking_disabled = self.checking_disabled;
        if let Ok(query) = Query::read(&mut BinDecoder::new(&self.wire)) {
            message.add_query(query);
        }
        if self.edns.is_some() {
            message.set_edns(self.own_edns());
        }
        message
    }

    fn own_edns(&self) -> Edns {
        let mut edns = Edns::new();
        edns.set_max_payload(u16::try_from(UDP_BYTES_MAX).unwrap_or(u16::MAX));
        edns.set_version(0);
        edns.set_dnssec_ok(self.edns.is_some_and(|e| e.dnssec_ok));
        edns
    }

    /// The query for an upstream: the same question, with an OPT record of our own. Its id is zero; the
    /// resolver asks with one of its own.
    pub fn upstream_query(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        let name_bytes = self.wire.len().saturating_sub(4);
        bytes[2] = u8::from(self.recursion_desired);
        bytes[3] = u8::from(self.authentic_data) << 5 | u8::from(self.checking_disabled) << 4;
        bytes[5] = 1;
        bytes[11] = 1;
        // In small letters, whatever the guest's: their case would carry a bit each past every limit. A label
        // has at most 63 bytes, so that no length is taken for a letter.
        bytes.extend(self.wire.iter().take(name_bytes).map(u8::to_ascii_lowercase));
        bytes.extend(self.wire.iter().skip(name_bytes));
        let payload = u16::try_from(UDP_BYTES_MAX).unwrap_or(u16::MAX).to_be_bytes();
        let dnssec_ok = u8::from(self.edns.is_some_and(|e| e.dnssec_ok)) << 7;
        let [high, low] = OPT.to_be_bytes();
        bytes.extend_from_slice(&[0, high, low, payload[0], payload[1], 0, 0, dnssec_ok, 0, 0, 0]);
        bytes
    }

    /// An upstream's answer as this client gets it; `None` when it is not an answer to this question.
    pub fn relay(&self, upstream: &Upstream<'_>, room: Option<usize>) -> Option<Relayed> {
        if !upstream.is_for(&self.wire) {
            return None;
        }
        let own_opt = match self.edns {
            Some(_) => Some(self.opt_record(upstream)?),
            // A code above the header's four bits cannot be said without an OPT record.
            None if upstream.code_high != 0 => return None,
            None => None,
        };
        let opt_bytes = own_opt.as_ref().map_or(0, Vec::len);
        let mut bytes = upstream.bytes[..upstream.end].to_vec();
        let mut additionals = upstream.additionals;
        let truncated = room.is_some_and(|room| bytes.len() + opt_bytes > room);
        if truncated {
            bytes.truncate(upstream.question_end);
            bytes[2] |= 0x02;
            bytes[6..HEADER_BYTES].fill(0);
            additionals = 0;
        }
        if let Some(opt) = own_opt {
            bytes.extend_from_slice(&opt);
            additionals += 1;
        }
        bytes[..2].copy_from_slice(&self.id.to_be_bytes());
        bytes[2] = bytes[2] & 0xfe | u8::from(self.recursion_desired);
        bytes[3] = bytes[3] & 0xef | u8::from(self.checking_disabled) << 4;
        bytes[10..12].copy_from_slice(&additionals.to_be_bytes());
        bytes[HEADER_BYTES..HEADER_BYTES + self.wire.len()].copy_from_slice(&self.wire);
        Some(Relayed { bytes, truncated })
    }

    /// Our OPT record in place of the upstream's: what it says of its own link stays behind, its extended
    /// errors and the high bits of its code pass.
    fn opt_record(&self, upstream: &Upstream<'_>) -> Option<Vec<u8>> {
        let payload = u16::try_from(UDP_BYTES_MAX).unwrap_or(u16::MAX).to_be_bytes();
        let dnssec_ok = u8::from(self.edns.is_some_and(|e| e.dnssec_ok)) << 7;
        let [high, low] = OPT.to_be_bytes();
        let mut record = vec![
            0,
            high,
            low,
            payload[0],
            payload[1],
            upstream.code_high,
            0,
            dnssec_ok,
            0,
        ];
        record.extend_from_slice(&u16::try_from(upstream.extended_errors.len()).ok()?.to_be_bytes());
        record.extend_from_slice(&upstream.extended_errors);
        Some(record)
    }
}

/// A query of our own for a name's addresses. Its id is zero; the resolver asks with one of its own.
pub fn address_query(name: &Name, query_type: u16) -> Option<Vec<u8>> {
    let mut query = Query::query(name.as_str().parse().ok()?, query_type.into());
    query.name.set_fqdn(true);
    let mut message = Message::query();
    message.metadata.id = 0;
    message.metadata.recursion_desired = true;
    message.add_query(query);
    let mut edns = Edns::new();
    edns.set_max_payload(u16::try_from(UDP_BYTES_MAX).unwrap_or(u16::MAX));
    message.set_edns(edns);
    message.to_vec().ok()
}

/// An upstream's answer made ready for a client.
#[derive(Debug, PartialEq, Eq)]
pub struct Relayed {
    /// The message.
    pub bytes: Vec<u8>,
    /// It did not fit: the client learns nothing but that.
    pub truncated: bool,
}

/// An upstream's answer, looked through once.
#[derive(Debug)]
pub struct Upstream<'a> {
    bytes: &'a [u8],
    question_end: usize,
    answers: Vec<RawRecord>,
    /// Where the records that are relayed end: before the OPT record. What follows it is left out, since
    /// names in it may point past the place of the OPT record; additional records are never needed.
    end: usize,
    additionals: u16,
    code_high: u8,
    /// Extended errors, as options.
    extended_errors: Vec<u8>,
}

/// Where a record lies in its message.
#[derive(Debug, Clone, Copy)]
struct RawRecord {
    name: usize,
    kind: u16,
    class: u16,
    ttl: u32,
    data: usize,
    data_bytes: usize,
}

impl<'a> Upstream<'a> {
    /// Looks through a response; `None` when it is not one, or does not hold together.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        if bytes.len() < HEADER_BYTES || bytes[2] & 0xf8 != 0x80 || u16_at(bytes, 4) != Some(1) {
            return None;
        }
        let question_end = uncompressed_name_end(bytes, HEADER_BYTES)? + 4;
        let mut at = question_end;
        let [answers, authorities, additionals] = [6, 8, 10].map(|place| u16_at(bytes, place).unwrap_or(0));
        let mut upstream = Self {
            bytes,
            question_end,
            answers: Vec::new(),
            end: 0,
            additionals,
            code_high: 0,
            extended_errors: Vec::new(),
        };
        for _ in 0..answers {
            let record = RawRecord::read(bytes, &mut at)?;
            upstream.answers.push(record);
        }
        for _ in 0..authorities {
            RawRecord::read(bytes, &mut at)?;
        }
        for place in 0..additionals {
            let start = at;
            let record = RawRecord::read(bytes, &mut at)?;
            if record.kind == OPT {
                upstream.read_opt(&record);
                (at, upstream.additionals) = (start, place);
                break;
            }
        }
        // A question cut short passes the walk above when no record follows it.
        upstream.end = at;
        (at <= bytes.len()).then_some(upstream)
    }

    /// Whether it answers exactly this question; the case of letters may differ.
    pub fn is_for(&self, question: &[u8]) -> bool {
        same_question(&self.bytes[HEADER_BYTES..self.question_end], question)
    }

    /// The response code, its high bits included (RFC 6891 §6.1.3).
    pub fn code(&self) -> u16 {
        u16::from(self.code_high) << 4 | u16::from(self.bytes[3] & 0xf)
    }

    /// The addresses that the answer section gives `name`, through its aliases, and the shortest time
    /// to live on the way. Empty unless the code is NOERROR.
    pub fn addresses_of(&self, name: &Name) -> (Vec<IpAddr>, Duration) {
        let mut addresses = Vec::new();
        let mut ttl = u32::MAX;
        if self.code() != 0 {
            return (addresses, Duration::ZERO);
        }
        let owned: Vec<(Name, &RawRecord)> = self
            .answers
            .iter()
            .filter(|r| r.class == u16::from(DNSClass::IN) && matches!(r.kind, A | CNAME | AAAA))
            .filter_map(|r| Some((name_at(self.bytes, r.name)?, r)))
            .collect();
        let mut current = name.clone();
        for _ in 0..=ALIASES_MAX {
            for (_, record) in owned
                .iter()
                .filter(|(owner, r)| *owner == current && r.kind != CNAME)
            {
                if let Some(address) = self.address(record) {
                    addresses.push(address);
                    ttl = ttl.min(record.ttl);
                }
            }
            let alias = owned
                .iter()
                .find(|(owner, r)| *owner == current && r.kind == CNAME);
            let Some((target, record)) = alias.and_then(|(_, r)| Some((name_at(self.bytes, r.data)?, r)))
            else {
                break;
            };
            ttl = ttl.min(record.ttl);
            current = target;
        }
        addresses.sort_unstable();
        addresses.dedup();
        (addresses, Duration::from_secs(ttl.into()))
    }

    /// The names that the answer section leads `name` through by aliases, `name` aside; `None` when there are more than
    /// [`ALIASES_MAX`]. All that any order of reading could lead through: a name should have one alias, and an answer
    /// may give it several. Whatever the code is: an alias of what does not exist is one as well.
    pub fn aliases_of(&self, name: &Name) -> Option<Vec<Name>> {
        let given: Vec<(Name, Name)> = self
            .answers
            .iter()
            .filter(|r| r.class == u16::from(DNSClass::IN) && r.kind == CNAME)
            .filter_map(|r| Some((name_at(self.bytes, r.name)?, name_at(self.bytes, r.data)?)))
            .collect();
        let mut aliases: Vec<Name> = Vec::new();
        let mut next = Some(name.clone());
        let mut read = 0;
        while let Some(owner) = next {
            for (_, target) in given.iter().filter(|(of, _)| *of == owner) {
                if target != name && !aliases.contains(target) {
                    if aliases.len() >= ALIASES_MAX {
                        return None;
                    }
                    aliases.push(target.clone());
                }
            }
            next = aliases.get(read).cloned();
            read += 1;
        }
        Some(aliases)
    }

    /// Holds the times to live in the answer section within bounds, in what [`Question::relay`] made of it.
    /// A time is never raised beyond what a DNSSEC signature says, for whoever checks that
    /// (RFC 4035 §5.3.3).
    pub fn clamp_ttls(&self, relayed: &mut [u8], least: Duration, most: Duration) {
        let seconds = |bound: Duration| u32::try_from(bound.as_secs()).unwrap_or(u32::MAX);
        let (least, most) = (seconds(least), seconds(most));
        for record in &self.answers {
            // Four bytes, before the two of the data's length.
            let at = record.data.saturating_sub(6);
            if let Some(bytes) = relayed.get_mut(at..at + 4) {
                bytes.copy_from_slice(&record.ttl.max(least).min(most).to_be_bytes());
            }
        }
    }

    fn address(&self, record: &RawRecord) -> Option<IpAddr> {
        let data = self.bytes.get(record.data..record.data + record.data_bytes)?;
        match record.kind {
            A => <[u8; 4]>::try_from(data).ok().map(IpAddr::from),
            AAAA => <[u8; 16]>::try_from(data).ok().map(IpAddr::from),
            _ => None,
        }
    }

    fn read_opt(&mut self, record: &RawRecord) {
        self.code_high = record.ttl.to_be_bytes()[0];
        let mut options = self
            .bytes
            .get(record.data..record.data + record.data_bytes)
            .unwrap_or_default();
        while let (Some(code), Some(length)) = (u16_at(options, 0), u16_at(options, 2)) {
            let Some((option, rest)) = options.split_at_checked(4 + usize::from(length)) else {
                break;
            };
            if code == EXTENDED_ERROR && self.extended_errors.len() + option.len() <= UDP_BYTES_PLAIN / 2 {
                self.extended_errors.extend_from_slice(option);
            }
            options = rest;
        }
    }
}

impl RawRecord {
    /// Reads the record at `at` and moves past it.
    fn read(bytes: &[u8], at: &mut usize) -> Option<Self> {
        let name = *at;
        let fixed = name_end(bytes, name)?;
        let ttl = u32::from(u16_at(bytes, fixed + 4)?) << 16 | u32::from(u16_at(bytes, fixed + 6)?);
        let data_bytes = usize::from(u16_at(bytes, fixed + 8)?);
        let data = fixed + 10;
        *at = data + data_bytes;
        (*at <= bytes.len()).then_some(Self {
            name,
            kind: u16_at(bytes, fixed)?,
            class: u16_at(bytes, fixed + 2)?,
            // RFC 2181 §8: a time with its top bit set is zero.
            ttl: if ttl >> 31 == 0 { ttl } else { 0 },
            data,
            data_bytes,
        })
    }
}

/// Whether two questions (name, type, class) are the same but for the case of letters.
pub fn same_question(one: &[u8], other: &[u8]) -> bool {
    let split = |q: &[u8]| q.len().checked_sub(4);
    match (split(one), split(other)) {
        (Some(a), Some(b)) => one[..a].eq_ignore_ascii_case(&other[..b]) && one[a..] == other[b..],
        _ => false,
    }
}

/// The question of a message that has exactly one, without compression.
pub fn question_of(bytes: &[u8]) -> Option<&[u8]> {
    let end = uncompressed_name_end(bytes, HEADER_BYTES)? + 4;
    if u16_at(bytes, 4) == Some(1) {
        bytes.get(HEADER_BYTES..end)
    } else {
        None
    }
}

fn name_at(bytes: &[u8], at: usize) -> Option<Name> {
    let mut decoder = BinDecoder::new(bytes);
    decoder.read_slice(at).ok()?;
    let name = hickory_proto::rr::Name::read(&mut decoder).ok()?;
    Name::from_labels(name.iter()).ok()
}

/// Where a name ends that has no pointer in it.
fn uncompressed_name_end(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length if length < 0x40 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
}

/// Where a name ends in its record; a pointer ends it.
fn name_end(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 1),
            length if length < 0x40 => at += 1 + usize::from(length),
            length if length >= 0xc0 => return Some(at + 2),
            _ => return None,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Every message written here fits its limits; an empty one, which no client takes for an answer, is what
/// would be left if that were wrong.
fn encode(mut message: Message) -> Vec<u8> {
    message.metadata.message_type = MessageType::Response;
    message.to_vec().unwrap_or_default()
}

const A: u16 = 1;
const CNAME: u16 = 5;
const AAAA: u16 = 28;

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
