//! Local zones: names that the gateway answers itself, before and without any verdict (RFC 1034 §4.3.2).
//!
//! Owns which zone a name is in and what the zone says of it. Zones have an order, and the first that a
//! name is in answers; the root zone, if there is one, comes after all others. Inside a zone nothing is
//! asked upstream: a type that a name does not have is NODATA, a name that is not there NXDOMAIN, so that
//! no local name leaks. The exceptions are records without an address, which say so: with them a zone, even
//! the root's, is a list of the names in it that exist at all. Compared without regard to case.

use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA};
use hickory_proto::rr::{Name as WireName, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use vnet_proto::model::Name;

use super::message::Question;
use crate::message::Zone;

/// Zones of one network at once.
pub const ZONES_MAX: usize = 256;
/// Records of one zone.
pub const RECORDS_MAX: usize = 4_096;
/// Seconds for which local answers may be kept. A zone changes while guests run; gvproxy says zero too.
const LOCAL_TTL: u32 = 0;

/// Why zones could not be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// There are [`ZONES_MAX`] zones.
    #[error("there are {ZONES_MAX} zones already; delete one first")]
    TooMany,
    /// The zone has more than [`RECORDS_MAX`] records.
    #[error("the zone has {0} records (at most {RECORDS_MAX})")]
    TooLarge(usize),
}

/// The local zones of a network, in order.
#[derive(Debug, Clone, Default)]
pub struct Zones {
    zones: Vec<Zone>,
}

impl Zones {
    /// No zones.
    pub fn new() -> Self {
        Self::default()
    }

    /// The zones in order of precedence.
    pub fn list(&self) -> &[Zone] {
        &self.zones
    }

    /// Replaces the zone of that name in its place, or adds it after the others.
    ///
    /// # Errors
    /// [`ZoneError`] at a limit; nothing is changed then.
    pub fn set(&mut self, zone: Zone) -> Result<(), ZoneError> {
        if zone.records.len() > RECORDS_MAX {
            return Err(ZoneError::TooLarge(zone.records.len()));
        }
        match self.zones.iter().position(|z| z.name == zone.name) {
            Some(place) => self.zones[place] = zone,
            None if self.zones.len() >= ZONES_MAX => return Err(ZoneError::TooMany),
            None => self.zones.push(zone),
        }
        Ok(())
    }

    /// As gvproxy adds a zone: records come before those of a zone of that name, and the default address is
    /// the new one, even if it is none.
    ///
    /// # Errors
    /// [`ZoneError`] at a limit; nothing is changed then.
    pub fn merge(&mut self, mut zone: Zone) -> Result<(), ZoneError> {
        if let Some(known) = self.zones.iter().find(|z| z.name == zone.name) {
            zone.records.extend(known.records.iter().cloned());
        }
        self.set(zone)
    }

    /// Removes a zone; `None` names the root. What it was.
    pub fn remove(&mut self, name: Option<&Name>) -> Option<Zone> {
        let at = self.zones.iter().position(|z| z.name.as_ref() == name)?;
        Some(self.zones.remove(at))
    }

    /// The answer to a question about a local name; `None` when the name is in no zone, or is one that its
    /// zone has looked up upstream.
    pub fn answer(&self, question: &Question) -> Option<Vec<u8>> {
        if let Some(answer) = self.answer_reverse(question) {
            return Some(answer);
        }
        let zone = self.zone_of(question.name.as_ref())?;
        let apex = zone.name.as_ref();
        let below = labels_below(question.name.as_ref(), apex)?;
        let found = match find(zone, below) {
            Found::Addresses(addresses) => Some(addresses),
            Found::Nothing => Some(Vec::new()),
            Found::NoName => None,
            Found::Upstream => return None,
        };
        let owner = wire_name(&question.wire)?;
        let apex = wire_of(apex);
        let mut answers: Vec<Record> = found
            .iter()
            .flatten()
            .filter_map(|a| address_record(&owner, *a, question.query_type))
            .collect();
        if below.is_empty() {
            answers.extend(apex_record(&owner, &apex, question.query_type));
        }
        let code = if found.is_some() {
            ResponseCode::NoError
        } else {
            ResponseCode::NXDomain
        };
        let authority = answers.is_empty().then(|| soa(&apex, &apex));
        Some(question.local_answer(code, answers, authority))
    }

    fn zone_of(&self, name: Option<&Name>) -> Option<&Zone> {
        let inside = |zone: &&Zone| match (name, zone.name.as_ref()) {
            (Some(name), Some(apex)) => name == apex || name.is_below(apex),
            (_, None) | (None, Some(_)) => false,
        };
        let root = || self.zones.iter().find(|z| z.name.is_none());
        self.zones.iter().find(inside).or_else(root)
    }

    /// A PTR question about an address that a local record has, answered with the record's name.
    fn answer_reverse(&self, question: &Question) -> Option<Vec<u8>> {
        if question.query_type != u16::from(RecordType::PTR) {
            return None;
        }
        let owner = wire_name(&question.wire)?;
        let address = owner
            .parse_arpa_name()
            .ok()
            .filter(|net| net.prefix_len() == net.max_prefix_len())?
            .addr();
        let (zone, name) = self.zones.iter().find_map(|zone| {
            zone.records
                .iter()
                .find(|(_, a)| *a == Some(address))
                .map(|(name, _)| (zone, name.as_ref()))
        })?;
        let apex = wire_of(zone.name.as_ref());
        let target = wire_of(name).append_domain(&apex).ok()?;
        let record = Record::from_rdata(owner, LOCAL_TTL, RData::PTR(PTR(target)));
        Some(question.local_answer(ResponseCode::NoError, vec![record], None))
    }
}

/// What a zone says of a name in it.
enum Found {
    Addresses(Vec<IpAddr>),
    /// The name is there, by itself or above another one, without an address.
    Nothing,
    NoName,
    /// It is looked up like a name of no zone.
    Upstream,
}

/// `below` is the name without the zone's, empty for the zone itself.
fn find(zone: &Zone, below: &str) -> Found {
    let is_it = |name: &Option<Name>| name.as_ref().map_or("", Name::as_str) == below;
    let of_name = || zone.records.iter().filter(|(name, _)| is_it(name));
    let own: Vec<IpAddr> = of_name().filter_map(|(_, address)| *address).collect();
    if own.is_empty() && of_name().next().is_some() {
        return Found::Upstream;
    }
    let above_another = || {
        zone.records.iter().flat_map(|(name, _)| name).any(|name| {
            name.as_str()
                .strip_suffix(below)
                .is_some_and(|rest| rest.ends_with('.'))
        })
    };
    match (own.is_empty(), zone.default_address) {
        (false, _) => Found::Addresses(own),
        (true, Some(address)) => Found::Addresses(vec![address]),
        (true, None) if below.is_empty() || above_another() => Found::Nothing,
        (true, None) => Found::NoName,
    }
}

/// The part of a name before `apex`, without the dot between.
fn labels_below<'a>(name: Option<&'a Name>, apex: Option<&Name>) -> Option<&'a str> {
    let name = name.map_or("", Name::as_str);
    match apex {
        None => Some(name),
        Some(apex) if name == apex.as_str() => Some(""),
        Some(apex) => name.strip_suffix(apex.as_str())?.strip_suffix('.'),
    }
}

fn address_record(owner: &WireName, address: IpAddr, query_type: u16) -> Option<Record> {
    let data = match (address, RecordType::from(query_type)) {
        (IpAddr::V4(v4), RecordType::A | RecordType::ANY) => RData::A(A(v4)),
        (IpAddr::V6(v6), RecordType::AAAA | RecordType::ANY) => RData::AAAA(AAAA(v6)),
        _ => return None,
    };
    Some(Record::from_rdata(owner.clone(), LOCAL_TTL, data))
}

/// What every zone has at its top (RFC 1035 §5.2).
fn apex_record(owner: &WireName, apex: &WireName, query_type: u16) -> Option<Record> {
    match RecordType::from(query_type) {
        RecordType::SOA => Some(soa(owner, apex)),
        RecordType::NS => Some(Record::from_rdata(
            owner.clone(),
            LOCAL_TTL,
            RData::NS(NS(apex.clone())),
        )),
        _ => None,
    }
}

fn soa(owner: &WireName, apex: &WireName) -> Record {
    let data = SOA::new(apex.clone(), apex.clone(), 1, 3_600, 600, 86_400, LOCAL_TTL);
    Record::from_rdata(owner.clone(), LOCAL_TTL, RData::SOA(data))
}

/// The name of a question as it came.
fn wire_name(question: &[u8]) -> Option<WireName> {
    WireName::read(&mut BinDecoder::new(question)).ok()
}

fn wire_of(name: Option<&Name>) -> WireName {
    let parsed = name.and_then(|n| WireName::from_ascii(n.as_str()).ok());
    let mut wire = parsed.unwrap_or_else(WireName::root);
    wire.set_fqdn(true);
    wire
}

/// The zones that gvproxy has when it is not told others: `gateway` and `host` in both of its names.
pub fn default_zones(gateway: Ipv4Addr, host_alias: Option<Ipv4Addr>) -> Zones {
    let label = |text: &str| text.parse::<Name>().ok();
    let mut records = vec![(label("gateway"), Some(IpAddr::V4(gateway)))];
    records.extend(host_alias.map(|host| (label("host"), Some(IpAddr::V4(host)))));
    let zones = ["containers.internal", "docker.internal"]
        .into_iter()
        .filter_map(|name| {
            Some(Zone {
                name: Some(name.parse().ok()?),
                records: records.clone(),
                default_address: None,
            })
        });
    Zones {
        zones: zones.collect(),
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, Query};

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

    fn zone(name: Option<&str>, records: &[(&str, &str)], default: Option<&str>) -> Zone {
        Zone {
            name: name.map(|n| n.parse().unwrap()),
            records: records
                .iter()
                .map(|(n, a)| (n.parse().ok(), a.parse().ok()))
                .collect(),
            default_address: default.map(|a| a.parse().unwrap()),
        }
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
        // An address beside it makes it local.
        zones
            .set(zone(
                None,
                &[("api.example.com", ""), ("api.example.com", "10.0.0.2")],
                None,
            ))
            .unwrap();
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
            ["10.0.0.2", "10.0.0.3"]
        );
    }

    #[test]
    fn the_first_zone_answers_and_the_root_comes_last() {
        let mut zones = Zones::new();
        zones.set(zone(None, &[], Some("10.9.9.9"))).unwrap();
        zones.set(zone(Some("test"), &[], Some("10.0.0.1"))).unwrap();
        zones.set(zone(Some("a.test"), &[], Some("10.0.0.2"))).unwrap();
        assert_eq!(
            data(&ask(&zones, "x.a.test.", RecordType::A).unwrap()),
            ["10.0.0.1"]
        );
        assert_eq!(
            data(&ask(&zones, "example.com.", RecordType::A).unwrap()),
            ["10.9.9.9"]
        );
    }

    #[test]
    fn reverse_lookups_find_local_records_only() {
        let answer = ask(&default(), "254.127.168.192.in-addr.arpa.", RecordType::PTR).unwrap();
        assert_eq!(data(&answer), ["host.containers.internal."]);
        assert!(ask(&default(), "9.127.168.192.in-addr.arpa.", RecordType::PTR).is_none());
        assert!(ask(&default(), "127.168.192.in-addr.arpa.", RecordType::PTR).is_none());
    }

    #[test]
    fn setting_replaces_merging_prepends_removing_removes() {
        let mut zones = default();
        zones
            .merge(zone(
                Some("docker.internal"),
                &[("host", "10.0.0.9")],
                Some("10.0.0.1"),
            ))
            .unwrap();
        assert_eq!(
            data(&ask(&zones, "host.docker.internal.", RecordType::A).unwrap()),
            ["10.0.0.9", "192.168.127.254"]
        );
        zones
            .set(zone(Some("docker.internal"), &[("only", "10.0.0.9")], None))
            .unwrap();
        assert_eq!(
            ask(&zones, "host.docker.internal.", RecordType::A)
                .unwrap()
                .metadata
                .response_code,
            ResponseCode::NXDomain
        );
        assert!(zones.remove(Some(&"docker.internal".parse().unwrap())).is_some());
        assert!(zones.remove(None).is_none());
        assert!(ask(&zones, "host.docker.internal.", RecordType::A).is_none());
    }

    #[test]
    fn zones_and_records_are_bounded() {
        let mut zones = Zones::new();
        for n in 0..ZONES_MAX {
            zones.set(zone(Some(&format!("z{n}.test")), &[], None)).unwrap();
        }
        assert_eq!(
            zones.set(zone(Some("more.test"), &[], None)),
            Err(ZoneError::TooMany)
        );
        let many = vec![("a", "10.0.0.1"); RECORDS_MAX + 1];
        assert_eq!(
            zones.set(zone(Some("z0.test"), &many, None)),
            Err(ZoneError::TooLarge(RECORDS_MAX + 1))
        );
        assert!(zones.list()[0].records.is_empty());
    }
}
