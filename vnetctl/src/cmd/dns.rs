//! `dns zones|bindings|denied`: local zones, what lookups taught, and what was refused.

use std::net::IpAddr;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::v1;

use super::Context;
use super::select::ListVmArgs;
use crate::client::unary;
use crate::failure::Failure;
use crate::output::text::safe;
use crate::output::{Row, text, words};

/// Nouns of `dns`.
#[derive(Debug, Subcommand)]
pub enum DnsCommand {
    /// List local zones in order of precedence, or change them
    #[command(
        after_help = "Examples:\n  vnetctl dns zones\n  vnetctl dns zones set lab.internal db=192.168.127.9\n  \
        vnetctl dns zones add lab.internal web=192.168.127.10\n  vnetctl dns zones remove lab.internal"
    )]
    Zones(ZonesArgs),
    /// List names and the addresses that VMs' own lookups bound to them
    #[command(after_help = "Examples:\n  vnetctl dns bindings --vm web")]
    Bindings(ListVmArgs),
    /// List denied lookups, newest first
    #[command(after_help = "Examples:\n  vnetctl dns denied -o json")]
    Denied(ListVmArgs),
}

/// Arguments of `dns zones`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ZonesArgs {
    /// What to do; without it, list.
    #[command(subcommand)]
    pub command: Option<ZonesCommand>,
    /// Only this network's
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

/// Verbs of `dns zones`.
#[derive(Debug, Subcommand)]
pub enum ZonesCommand {
    /// List zones
    List(NetworkArgs),
    /// Add a zone, or replace the one of that name
    #[command(
        after_help = "Examples:\n  vnetctl dns zones set lab.internal db=192.168.127.9 web=192.168.127.10\n  \
        vnetctl dns zones set apps.internal --default 192.168.127.254\n  \
        vnetctl dns zones set apps.internal '/^web-[0-9]+$/=192.168.127.10'\n  \
        vnetctl dns zones set ads.example --empty                # every name below it does not exist"
    )]
    Set(SetArgs),
    /// Add records to a zone, before those that it has, or add the zone
    #[command(
        after_help = "Examples:\n  vnetctl dns zones add containers.internal registry=192.168.127.254\n  \
        vnetctl dns zones add lab.internal db=192.168.127.11     # db has another address before; this one answers"
    )]
    Add(AddArgs),
    /// Remove a zone, or some of its records
    #[command(after_help = "Examples:\n  vnetctl dns zones remove lab.internal\n  \
        vnetctl dns zones remove lab.internal db                 # all records of that name\n  \
        vnetctl dns zones remove lab.internal db=192.168.127.9   # the one with that address")]
    Remove(RemoveArgs),
}

/// Which network.
#[derive(Debug, Args)]
pub struct NetworkArgs {
    /// The network; may be left out where there is only one
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
}

/// Arguments of `dns zones set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// The zone's name, as lab.internal
    #[arg(value_name = "ZONE")]
    pub name: String,
    /// A name below the zone and its address, or `upstream` to have it looked up after all; `@` is the zone itself, and
    /// /PATTERN/ the names that an expression matches
    #[arg(value_name = "NAME=ADDRESS", value_parser = record)]
    pub records: Vec<v1::ZoneRecord>,
    /// The address of names that no record has; without it they do not exist
    #[arg(long, value_name = "ADDRESS")]
    pub default: Option<IpAddr>,
    /// Without a record: the zone's name and all below it do not exist, and nobody else is asked for them
    #[arg(long, conflicts_with_all = ["records", "default"])]
    pub empty: bool,
    /// Which network.
    #[command(flatten)]
    pub network: NetworkArgs,
}

/// Arguments of `dns zones add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// The zone's name, as lab.internal
    #[arg(value_name = "ZONE")]
    pub name: String,
    /// Records, as `set` takes them
    #[arg(value_name = "NAME=ADDRESS", value_parser = record, required = true)]
    pub records: Vec<v1::ZoneRecord>,
    /// The address of names that no record has, in place of the one that the zone has; without it there is none any
    /// more
    #[arg(long, value_name = "ADDRESS")]
    pub default: Option<IpAddr>,
    /// Which network.
    #[command(flatten)]
    pub network: NetworkArgs,
}

/// Arguments of `dns zones remove`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// The zone's name
    #[arg(value_name = "ZONE")]
    pub name: String,
    /// Records rather than the whole zone: a name, a /PATTERN/ or `@` for all that it has, or one with its address
    #[arg(value_name = "NAME[=ADDRESS]", value_parser = removed)]
    pub records: Vec<v1::ZoneRecord>,
    /// Which network.
    #[command(flatten)]
    pub network: NetworkArgs,
}

impl DnsCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        match self {
            Self::Zones(ZonesArgs { command, network }) => {
                let command = command.unwrap_or(ZonesCommand::List(NetworkArgs { network }));
                zones(command, context).await
            }
            Self::Bindings(vms) => {
                let client = context.connection.open().await?;
                let request = v1::ListBindingsRequest { vms: vms.message() };
                let answer = client.dns().list_bindings(unary(request)).await?.into_inner();
                context.output.list(&answer.bindings)
            }
            Self::Denied(vms) => {
                let client = context.connection.open().await?;
                let request = v1::ListDeniedRequest {
                    vms: vms.message(),
                    ..Default::default()
                };
                let answer = client.dns().list_denied(unary(request)).await?.into_inner();
                context.output.list(&answer.denied)
            }
        }
    }
}

impl SetArgs {
    /// An empty zone is not what a forgotten record means: it takes names away.
    fn check(&self) -> Result<(), Failure> {
        if self.records.is_empty() && self.default.is_none() && !self.empty {
            return Err(Failure::Usage(format!(
                "zone {} would have no record, so that neither it nor any name below it existed\n  give \
                 NAME=ADDRESS or --default ADDRESS, or --empty if that is meant",
                safe(&self.name)
            )));
        }
        Ok(())
    }
}

async fn zones(command: ZonesCommand, context: &mut Context) -> Result<(), Failure> {
    if let ZonesCommand::Set(args) = &command {
        args.check()?;
    }
    let client = context.connection.open().await?;
    match command {
        ZonesCommand::List(NetworkArgs { network }) => {
            let request = v1::ListZonesRequest {
                network: network.unwrap_or_default(),
            };
            let answer = client.dns().list_zones(unary(request)).await?.into_inner();
            context.output.list(&answer.zones)
        }
        ZonesCommand::Set(args) => {
            let zone = v1::Zone {
                network: args.network.network.unwrap_or_default(),
                name: args.name,
                records: args.records,
                default_address: args.default.map(|a| a.to_string()).unwrap_or_default(),
            };
            let request = v1::SetZoneRequest {
                zone: Some(zone),
                prepend_records: false,
            };
            let answer = client.dns().set_zone(unary(request)).await?.into_inner();
            let done = || described(answer.zone.as_ref());
            context.output.done("vnet.v1.SetZoneResponse", &answer, done)
        }
        ZonesCommand::Add(args) => {
            let zone = v1::Zone {
                network: args.network.network.unwrap_or_default(),
                name: args.name,
                records: args.records,
                default_address: args.default.map(|a| a.to_string()).unwrap_or_default(),
            };
            let request = v1::SetZoneRequest {
                zone: Some(zone),
                prepend_records: true,
            };
            let answer = client.dns().set_zone(unary(request)).await?.into_inner();
            let done = || described(answer.zone.as_ref());
            context.output.done("vnet.v1.SetZoneResponse", &answer, done)
        }
        ZonesCommand::Remove(args) if !args.records.is_empty() => {
            let network = args.network.network.unwrap_or_default();
            for record in args.records {
                let request = v1::DeleteZoneRecordRequest {
                    network: network.clone(),
                    zone: args.name.clone(),
                    record: Some(record),
                };
                let answer = client
                    .dns()
                    .delete_zone_record(unary(request))
                    .await?
                    .into_inner();
                let done = || described(answer.zone.as_ref());
                context
                    .output
                    .done("vnet.v1.DeleteZoneRecordResponse", &answer, done)?;
            }
            Ok(())
        }
        ZonesCommand::Remove(args) => {
            let request = v1::DeleteZoneRequest {
                network: args.network.network.unwrap_or_default(),
                name: args.name,
            };
            let answer = client.dns().delete_zone(unary(request)).await?.into_inner();
            context.output.done("vnet.v1.DeleteZoneResponse", &answer, || {
                format!("removed zone {}", answer.zone.clone().unwrap_or_default().name)
            })
        }
    }
}

impl Row for v1::Zone {
    const NAME: &'static str = "vnet.v1.Zone";
    const COLUMNS: &'static [&'static str] = &["NETWORK", "ZONE", "RECORDS", "DEFAULT"];

    fn cells(&self, _: SystemTime) -> Vec<String> {
        let record = |r: &v1::ZoneRecord| {
            let owner = match (&*r.name, &*r.regexp) {
                ("", "") => ZONE_ITSELF.to_owned(),
                (name, "") => name.to_owned(),
                (name, pattern) => format!("{name}/{pattern}/"),
            };
            let address = if r.address.is_empty() {
                UPSTREAM
            } else {
                &r.address
            };
            format!("{owner}={address}")
        };
        vec![
            self.network.clone(),
            self.name.clone(),
            text::or_none(self.records.iter().map(record).collect::<Vec<_>>().join(",")),
            text::or_none(self.default_address.as_str()),
        ]
    }
}

impl Row for v1::Binding {
    const NAME: &'static str = "vnet.v1.Binding";
    const COLUMNS: &'static [&'static str] = &["VM", "NAME", "ADDRESSES", "ENDS IN"];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        vec![
            self.vm.clone(),
            self.name.clone(),
            self.addresses.join(","),
            text::remaining(now, self.expires_at.as_ref()),
        ]
    }
}

impl Row for v1::DeniedLookup {
    const NAME: &'static str = "vnet.v1.DeniedLookup";
    const COLUMNS: &'static [&'static str] = &["VM", "NAME", "TYPE", "COUNT", "LAST", "BECAUSE"];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        vec![
            self.vm.clone(),
            self.name.clone(),
            self.query_type.clone(),
            self.count.to_string(),
            text::age(now, self.last_at.as_ref()),
            words::reason(self.reason.as_ref()),
        ]
    }
}

fn record(text: &str) -> Result<v1::ZoneRecord, String> {
    let expected =
        || format!("{text:?} is not a record (expected NAME=ADDRESS, as db=192.168.127.9, or NAME=upstream)");
    // A pattern may have equals signs in it, an address has none.
    let (owner, address) = text.rsplit_once('=').ok_or_else(expected)?;
    let address = match address {
        UPSTREAM => String::new(),
        address => address.parse::<IpAddr>().map_err(|_| expected())?.to_string(),
    };
    owned(owner, address).ok_or_else(expected)
}

/// A record that is to go: without an address, all of that name or pattern.
fn removed(text: &str) -> Result<v1::ZoneRecord, String> {
    let expected = || format!("{text:?} is not a record (expected NAME, /PATTERN/, @, or one with =ADDRESS)");
    let is_pattern = text.ends_with('/');
    match text.rsplit_once('=').filter(|_| !is_pattern) {
        Some((owner, address)) => {
            let address = address.parse::<IpAddr>().map_err(|_| expected())?;
            owned(owner, address.to_string()).ok_or_else(expected)
        }
        None => owned(text, String::new()).ok_or_else(expected),
    }
}

/// A record for `NAME`, `@`, `/PATTERN/` or `NAME/PATTERN/`.
fn owned(owner: &str, address: String) -> Option<v1::ZoneRecord> {
    let (name, regexp) = match owner.split_once('/') {
        Some((name, rest)) => (
            name,
            rest.strip_suffix('/').filter(|pattern| !pattern.is_empty())?,
        ),
        None if owner.is_empty() => return None,
        None if owner == ZONE_ITSELF => ("", ""),
        None => (owner, ""),
    };
    Some(v1::ZoneRecord {
        name: name.to_owned(),
        address,
        regexp: regexp.to_owned(),
    })
}

fn described(zone: Option<&v1::Zone>) -> String {
    let Some(zone) = zone else { return String::new() };
    match (zone.records.len(), zone.default_address.as_str()) {
        (0, "") => format!("zone {} is empty: no name in it exists", zone.name),
        (count, "") => format!("zone {} has {count} records", zone.name),
        (count, default) => format!("zone {} has {count} records; all else is {default}", zone.name),
    }
}

const ZONE_ITSELF: &str = "@";
/// In place of an address: the name is looked up after all.
const UPSTREAM: &str = "upstream";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_a_name_and_an_address() {
        let made = |name: &str, address: &str| v1::ZoneRecord {
            name: name.to_owned(),
            address: address.to_owned(),
            regexp: String::new(),
        };

        assert_eq!(record("db=192.168.127.9"), Ok(made("db", "192.168.127.9")));
        assert_eq!(record("@=2001:DB8::1"), Ok(made("", "2001:db8::1")));
        assert_eq!(record("api=upstream"), Ok(made("api", "")));
        assert!(record("db=").unwrap_err().contains("NAME=ADDRESS"));
        assert!(record("db").unwrap_err().contains("NAME=ADDRESS"));
        assert!(record("db=nine").unwrap_err().contains("NAME=ADDRESS"));
        assert!(record("=10.0.0.1").unwrap_err().contains("NAME=ADDRESS"));
    }

    #[test]
    fn a_pattern_stands_between_slashes_in_what_is_typed_and_in_what_is_listed() {
        let made = |name: &str, regexp: &str, address: &str| v1::ZoneRecord {
            name: name.to_owned(),
            address: address.to_owned(),
            regexp: regexp.to_owned(),
        };
        let known = [
            (
                "/^a=[0-9]{1,2}$/=10.0.0.1",
                made("", "^a=[0-9]{1,2}$", "10.0.0.1"),
            ),
            ("x/a/b/=upstream", made("x", "a/b", "")),
        ];
        for (text, expected) in &known {
            assert_eq!(record(text).as_ref(), Ok(expected));
        }
        for wrong in ["/a=10.0.0.1", "//=10.0.0.1", "x/a=10.0.0.1"] {
            assert!(record(wrong).unwrap_err().contains("is not a record"), "{wrong}");
        }
        let zone = v1::Zone {
            records: known.iter().map(|(_, record)| record.clone()).collect(),
            ..Default::default()
        };
        let listed = &zone.cells(SystemTime::now())[2];
        assert_eq!(*listed, known.map(|(text, _)| text).join(","));

        assert_eq!(removed("db"), Ok(made("db", "", "")));
        assert_eq!(removed("@"), Ok(made("", "", "")));
        assert_eq!(removed("/a=b/"), Ok(made("", "a=b", "")));
        assert_eq!(removed("/a/=10.0.0.1"), Ok(made("", "a", "10.0.0.1")));
        assert!(removed("db=x").unwrap_err().contains("is not a record"));
        assert!(removed("").unwrap_err().contains("is not a record"));
    }
}
