//! Local zones: names that the gateway answers itself, before and without any verdict (RFC 1034 §4.3.2).
//!
//! Owns which zone a name is in and what the zone says of it. Zones have an order, gvproxy's: the first that a
//! name is in answers, be there a longer one after it, and after the root's none is asked. So have the records of
//! a zone: the first that is for a name decides, by its name or its pattern. Inside a zone nothing is
//! asked upstream: a type that a name does not have is NODATA, a name that is not there NXDOMAIN, so that
//! no local name leaks. The exceptions are records without an address, which say so: with them a zone, even
//! the root's, is a list of the names in it that exist at all. Compared without regard to case.

use std::collections::HashSet;
use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA};
use hickory_proto::rr::{Name as WireName, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use vnet_proto::model::{Name, ZONE_PATTERNS_MAX, ZONE_RECORDS_MAX, ZONES_MAX, zone_text};

use super::message::Question;
use crate::zone::{Owner, Zone, ZoneRecord};

/// Seconds for which local answers may be kept. A zone changes while guests run; gvproxy says zero too.
const LOCAL_TTL: u32 = 0;

/// Why zones could not be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// There are [`ZONES_MAX`] zones.
    #[error("there are {ZONES_MAX} zones already; delete one first")]
    TooMany,
    /// The zone would have more than [`ZONE_RECORDS_MAX`] records.
    #[error("the zone would have {0} records (at most {ZONE_RECORDS_MAX})")]
    TooLarge(usize),
    /// All zones together would have more than [`ZONE_PATTERNS_MAX`] patterns.
    #[error("the zones of the network would have {0} patterns (at most {ZONE_PATTERNS_MAX})")]
    TooManyPatterns(usize),
    /// There is no zone of that name.
    #[error("there is no zone {0}")]
    NoZone(String),
    /// The zone has no such record.
    #[error("zone {0} has no such record")]
    NoRecord(String),
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
        if zone.records.len() > ZONE_RECORDS_MAX {
            return Err(ZoneError::TooLarge(zone.records.len()));
        }
        let others = self.zones.iter().filter(|other| other.name != zone.name);
        let patterns = zone.patterns() + others.map(Zone::patterns).sum::<usize>();
        if patterns > ZONE_PATTERNS_MAX {
            return Err(ZoneError::TooManyPatterns(patterns));
        }
        match self.zones.iter().position(|z| z.name == zone.name) {
            Some(place) => self.zones[place] = zone,
            None if self.zones.len() >= ZONES_MAX => return Err(ZoneError::TooMany),
            None => self.zones.push(zone),
        }
        Ok(())
    }

    /// As gvproxy adds a zone: records come before those of a zone of that name, and the default address is
    /// the new one, even if it is none. What the zone is then. A record that is there already is not there twice:
    /// the one behind could never answer, and who says the same again and again would fill the zone.
    ///
    /// # Errors
    /// [`ZoneError`] at a limit; nothing is changed then.
    pub fn merge(&mut self, mut zone: Zone) -> Result<Zone, ZoneError> {
        if let Some(known) = self.zones.iter().find(|z| z.name == zone.name) {
            let new: HashSet<Key<'_>> = zone.records.iter().map(|r| key(&r.owner, r.address)).collect();
            let more = known.records.iter();
            let more = more.filter(|r| !new.contains(&key(&r.owner, r.address)));
            let more: Vec<ZoneRecord> = more.cloned().collect();
            zone.records.extend(more);
        }
        self.set(zone.clone())?;
        Ok(zone)
    }

    /// Removes from the zone of that name the records that are for the same as one of these, and have its address
    /// if it has one. What the zone is then.
    ///
    /// # Errors
    /// [`ZoneError`] when there are none; nothing is changed then.
    pub fn remove_records(&mut self, name: Option<&Name>, records: &[ZoneRecord]) -> Result<Zone, ZoneError> {
        let text = || zone_text(name).to_owned();
        let zone = self.zones.iter_mut().find(|z| z.name.as_ref() == name);
        let zone = zone.ok_or_else(|| ZoneError::NoZone(text()))?;
        let meant: HashSet<Key<'_>> = records.iter().map(|r| key(&r.owner, r.address)).collect();
        let is_meant = |known: &ZoneRecord| {
            let of = |address| meant.contains(&key(&known.owner, address));
            of(None) || of(known.address)
        };
        let before = zone.records.len();
        zone.records.retain(|record| !is_meant(record));
        if zone.records.len() == before {
            return Err(ZoneError::NoRecord(text()));
        }
        Ok(zone.clone())
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
        self.zones.iter().find(|zone| zone.holds(name))
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
            let mut named = zone
                .records
                .iter()
                .filter(|r| r.owner == Owner::Apex || r.owner.name().is_some());
            // What a name does not stand for, as another record answers for it, is not its address.
            let stands = |r: &&ZoneRecord| {
                let below = r.owner.name().map_or("", Name::as_str);
                matches!(find(zone, below), Found::Addresses(all) if all.contains(&address))
            };
            let record = named.find(|r| r.address == Some(address) && stands(r))?;
            Some((zone, record.owner.name()))
        })?;
        let apex = wire_of(zone.name.as_ref());
        let target = wire_of(name).append_domain(&apex).ok()?;
        let record = Record::from_rdata(owner, LOCAL_TTL, RData::PTR(PTR(target)));
        Some(question.local_answer(ResponseCode::NoError, vec![record], None))
    }
}

/// What a record is the same as another by: name, pattern (empty for none) and address.
type Key<'a> = (Option<&'a Name>, &'a str, Option<IpAddr>);

fn key(owner: &Owner, address: Option<IpAddr>) -> Key<'_> {
    match owner {
        Owner::Apex => (None, "", address),
        Owner::Name(name) => (Some(name), "", address),
        Owner::Pattern(name, pattern) => (name.as_ref(), pattern.as_str(), address),
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

/// `below` is the name without the zone's, empty for the zone itself. The first record that is for it decides; of
/// those that are for the very same, the first of the other address family answers beside it.
fn find(zone: &Zone, below: &str) -> Found {
    let Some(first) = zone.records.iter().find(|record| record.owner.is(below)) else {
        return match zone.default_address {
            Some(address) => Found::Addresses(vec![address]),
            None if below.is_empty() || is_above_another(zone, below) => Found::Nothing,
            None => Found::NoName,
        };
    };
    let Some(address) = first.address else {
        return Found::Upstream;
    };
    let same = zone.records.iter().filter(|record| record.owner == first.owner);
    let beside = same
        .filter_map(|record| record.address)
        .find(|a| a.is_ipv4() != address.is_ipv4());
    Found::Addresses(std::iter::once(address).chain(beside).collect())
}

/// Whether a name has others below it, and so exists.
fn is_above_another(zone: &Zone, below: &str) -> bool {
    let mut names = zone.records.iter().filter_map(|record| record.owner.name());
    names.any(|name| {
        name.as_str()
            .strip_suffix(below)
            .is_some_and(|rest| rest.ends_with('.'))
    })
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

/// The zones that every network has.
#[cfg(test)]
pub fn default_zones(gateway: std::net::Ipv4Addr, host_alias: Option<std::net::Ipv4Addr>) -> Zones {
    Zones {
        zones: crate::zone::default_zones(gateway, host_alias),
    }
}

#[cfg(test)]
#[path = "zones_tests.rs"]
mod tests;
