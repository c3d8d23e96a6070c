//! A local zone, as flags, settings and commands give it: read from text, with one error that names the place.

use std::net::{IpAddr, Ipv4Addr};

use vnet_proto::model::{Name, NameError, PatternError, RecordPattern, ZONE_RECORDS_MAX};
use vnet_proto::model::{record_name, zone_name, zone_text};

/// Zones that every network serves, each with `gateway` and `host`.
pub const ZONES_DEFAULT: [&str; 2] = ["containers.internal", "docker.internal"];

/// A local DNS zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// Its name; `None` for the root, which every name is in.
    pub name: Option<Name>,
    /// Records, in order: the first that is for a name answers.
    pub records: Vec<ZoneRecord>,
    /// The address for names that no record is for. `None`: they do not exist.
    pub default_address: Option<IpAddr>,
}

/// A record of a zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneRecord {
    /// What it is for.
    pub owner: Owner,
    /// The address it answers with. One without is not local after all: its names are looked up upstream, under a
    /// verdict like any other.
    pub address: Option<IpAddr>,
}

/// Which names below a zone a record is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// The zone itself.
    Apex,
    /// This one, as `host`.
    Name(Name),
    /// Those that a pattern matches, and this one if there is one.
    Pattern(Option<Name>, RecordPattern),
}

/// What is wrong with a zone that was given as text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZoneProblem {
    /// Its name.
    #[error("zone name {0:?} is none: {1}")]
    Name(String, NameError),
    /// More records than a zone may have.
    #[error("zone {0}: the zone has {1} records (at most {ZONE_RECORDS_MAX})")]
    TooLarge(String, usize),
    /// A record's name.
    #[error("zone {0}: records[{1}].name is none: {2}")]
    RecordName(String, usize, NameError),
    /// A record's pattern.
    #[error("zone {0}: records[{1}].regexp cannot be used: {2}")]
    Pattern(String, usize, PatternError),
    /// A record's address.
    #[error("zone {0}: records[{1}].address {2:?} is not an address")]
    Address(String, usize, String),
    /// The default address.
    #[error("zone {0}: default address {1:?} is not an address")]
    Default(String, String),
}

impl Zone {
    /// Reads a zone: its name, its records as name, pattern and address, each of which may be empty, and its default
    /// address, which may be empty too.
    ///
    /// # Errors
    /// The first [`ZoneProblem`].
    pub fn read<'a>(
        name: &str,
        records: impl ExactSizeIterator<Item = [&'a str; 3]>,
        default_address: &str,
    ) -> Result<Self, ZoneProblem> {
        if records.len() > ZONE_RECORDS_MAX {
            return Err(ZoneProblem::TooLarge(name.to_owned(), records.len()));
        }
        let zone = zone_name(name).map_err(|error| ZoneProblem::Name(name.to_owned(), error))?;
        let read_record = |(place, [owner, pattern, address]): (usize, [&str; 3])| {
            Ok(ZoneRecord {
                owner: Owner::read(owner, pattern).map_err(|problem| match problem {
                    OwnerProblem::Name(error) => ZoneProblem::RecordName(name.to_owned(), place, error),
                    OwnerProblem::Pattern(error) => ZoneProblem::Pattern(name.to_owned(), place, error),
                })?,
                address: optional_address(address)
                    .ok_or_else(|| ZoneProblem::Address(name.to_owned(), place, address.to_owned()))?,
            })
        };
        Ok(Self {
            name: zone,
            records: records.enumerate().map(read_record).collect::<Result<_, _>>()?,
            default_address: optional_address(default_address)
                .ok_or_else(|| ZoneProblem::Default(name.to_owned(), default_address.to_owned()))?,
        })
    }

    /// How its name is written.
    pub fn text(&self) -> &str {
        zone_text(self.name.as_ref())
    }

    /// Patterns that it has.
    pub fn patterns(&self) -> usize {
        let has_one = |record: &&ZoneRecord| matches!(record.owner, Owner::Pattern(..));
        self.records.iter().filter(has_one).count()
    }

    /// Whether a name is in it.
    pub fn holds(&self, name: Option<&Name>) -> bool {
        match (name, &self.name) {
            (_, None) => true,
            (Some(name), Some(apex)) => name == apex || name.is_below(apex),
            (None, Some(_)) => false,
        }
    }
}

/// What is wrong with what a record is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnerProblem {
    /// The name.
    Name(NameError),
    /// The pattern.
    Pattern(PatternError),
}

impl Owner {
    /// Reads a name and a pattern, each of which may be empty; both are for the zone itself.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn read(name: &str, pattern: &str) -> Result<Self, OwnerProblem> {
        let name = match name {
            "" => None,
            name => Some(record_name(name).map_err(OwnerProblem::Name)?),
        };
        Ok(match (name, pattern) {
            (None, "") => Self::Apex,
            (Some(name), "") => Self::Name(name),
            (name, pattern) => {
                Self::Pattern(name, RecordPattern::new(pattern).map_err(OwnerProblem::Pattern)?)
            }
        })
    }

    /// Whether it is for a name, given without the zone's; empty is the zone itself.
    pub fn is(&self, below: &str) -> bool {
        match self {
            Self::Apex => below.is_empty(),
            Self::Name(name) => name.as_str() == below,
            Self::Pattern(name, pattern) => {
                name.as_ref().is_some_and(|name| name.as_str() == below) || pattern.is_match(below)
            }
        }
    }

    /// Its name, if it has one.
    pub fn name(&self) -> Option<&Name> {
        match self {
            Self::Apex | Self::Pattern(None, _) => None,
            Self::Name(name) | Self::Pattern(Some(name), _) => Some(name),
        }
    }

    /// Its pattern, if it has one.
    pub fn pattern(&self) -> Option<&RecordPattern> {
        match self {
            Self::Pattern(_, pattern) => Some(pattern),
            Self::Apex | Self::Name(_) => None,
        }
    }
}

/// The zones that gvproxy has when it is not told others: `gateway` and `host` in the names that containers know.
pub fn default_zones(gateway: Ipv4Addr, host_alias: Option<Ipv4Addr>) -> Vec<Zone> {
    let known = [("gateway", Some(gateway)), ("host", host_alias)];
    let record = |(name, address): (&str, Option<Ipv4Addr>)| {
        Some(ZoneRecord {
            owner: Owner::Name(Name::from_canonical(name).ok()?),
            address: Some(IpAddr::V4(address?)),
        })
    };
    let zone = |name: &str| {
        Some(Zone {
            name: Some(Name::from_canonical(name).ok()?),
            records: known.into_iter().filter_map(record).collect(),
            default_address: None,
        })
    };
    ZONES_DEFAULT.into_iter().filter_map(zone).collect()
}

/// An address, or none where there is no text.
fn optional_address(text: &str) -> Option<Option<IpAddr>> {
    match text {
        "" => Some(None),
        text => text.parse().ok().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_is_read_from_text_or_refused_with_the_place() {
        let zone = Zone::read(
            "Lab.Internal.",
            [
                ["Db", "", "10.0.0.1"],
                ["", "^a", ""],
                ["7", "b", "fd00::1"],
                ["", "", "10.0.0.2"],
            ]
            .into_iter(),
            "10.0.0.9",
        )
        .unwrap();
        assert_eq!(zone.text(), "lab.internal");
        assert_eq!(zone.patterns(), 2);
        let owners: Vec<bool> = ["db", "ax", "7", "", "c"]
            .iter()
            .map(|n| zone.records[0].owner.is(n))
            .collect();
        assert_eq!(owners, [true, false, false, false, false]);
        assert!(
            zone.records[1].owner.is("ax") && !zone.records[1].owner.is(""),
            "a pattern alone is not for the apex"
        );
        assert!(zone.records[2].owner.is("7") && zone.records[2].owner.is("abc"));
        assert!(zone.records[3].owner.is("") && !zone.records[3].owner.is("db"));

        let none = [["", "", ""]; 0];
        for (given, expected) in [
            (
                Zone::read("", none.into_iter(), ""),
                "zone name \"\" is none: the name is empty",
            ),
            (
                Zone::read("a.test", [["x", "", "y"]].into_iter(), ""),
                "zone a.test: records[0].address \"y\" is not an address",
            ),
            (
                Zone::read("a.test", [["x", "", ""], ["x", "(", ""]].into_iter(), ""),
                "zone a.test: records[1].regexp cannot be used: unclosed group",
            ),
            (
                Zone::read("a.test", [["x y", "", ""]].into_iter(), ""),
                "zone a.test: records[0].name is none: \"x y\" has a character that a name cannot have",
            ),
            (
                Zone::read("a.test", none.into_iter(), "z"),
                "zone a.test: default address \"z\" is not an address",
            ),
            (
                Zone::read(
                    "a.test",
                    vec![["x", "", ""]; ZONE_RECORDS_MAX + 1].into_iter(),
                    "",
                ),
                "zone a.test: the zone has 4097 records (at most 4096)",
            ),
        ] {
            assert_eq!(given.unwrap_err().to_string(), expected);
        }
    }
}
