//! `DnsService`: zones, bindings and denied lookups. The dataplane serves the zones.

use std::net::IpAddr;

use tonic::{Request, Response, Status};
use vnet_proto::model::{
    Name, NameError, RecordPattern, ZONE_PATTERNS_MAX, ZONE_RECORDS_MAX, record_name, zone_name, zone_text,
};
use vnet_proto::v1;
use vnet_proto::v1::command::Command;
use vnet_proto::v1::dns_service_server::DnsService;

use super::{Api, selector};
use crate::hub::Which;
use crate::refusal::Refusal;

/// How the root's zone is named.
const ROOT: &str = ".";

#[tonic::async_trait]
impl DnsService for Api {
    async fn list_zones(
        &self,
        request: Request<v1::ListZonesRequest>,
    ) -> Result<Response<v1::ListZonesResponse>, Status> {
        let zones = self.hub.zones(&request.into_inner().network)?;
        Ok(Response::new(v1::ListZonesResponse { zones }))
    }

    async fn set_zone(
        &self,
        request: Request<v1::SetZoneRequest>,
    ) -> Result<Response<v1::SetZoneResponse>, Status> {
        let request = request.into_inner();
        let zone = check_zone(request.zone.unwrap_or_default())?;
        let change = if request.prepend_records {
            Command::MergeZone
        } else {
            Command::SetZone
        };
        let zone = Some(self.change_zone(zone, change).await?);
        Ok(Response::new(v1::SetZoneResponse { zone }))
    }

    async fn delete_zone(
        &self,
        request: Request<v1::DeleteZoneRequest>,
    ) -> Result<Response<v1::DeleteZoneResponse>, Status> {
        let request = request.into_inner();
        let name = check_zone_name("name", &request.name)?;
        let zone = self
            .hub
            .zones(&request.network)?
            .into_iter()
            .find(|zone| zone.name == name);
        let zone = zone.ok_or_else(|| Refusal::NotFound(format!("there is no zone {name}")))?;
        let network = zone.network.clone();
        let sent = zone.clone();
        self.hub.command(&network, |_| Command::DeleteZone(sent)).await?;
        Ok(Response::new(v1::DeleteZoneResponse { zone: Some(zone) }))
    }

    async fn delete_zone_record(
        &self,
        request: Request<v1::DeleteZoneRecordRequest>,
    ) -> Result<Response<v1::DeleteZoneRecordResponse>, Status> {
        let request = request.into_inner();
        let mut record = request
            .record
            .ok_or_else(|| Refusal::field("record", "is not set"))?;
        let zone = check_zone_name("zone", &request.zone)?;
        check_record("record", &mut record, &zone)?;
        let zone = v1::Zone {
            network: request.network,
            name: zone,
            records: vec![record],
            default_address: String::new(),
        };
        let zone = Some(self.change_zone(zone, Command::RemoveRecords).await?);
        Ok(Response::new(v1::DeleteZoneRecordResponse { zone }))
    }

    async fn list_bindings(
        &self,
        request: Request<v1::ListBindingsRequest>,
    ) -> Result<Response<v1::ListBindingsResponse>, Status> {
        let bindings = self.hub.bindings(Which {
            vms: selector(request.into_inner().vms)?.as_ref(),
            ..Default::default()
        });
        Ok(Response::new(v1::ListBindingsResponse { bindings }))
    }

    async fn list_denied(
        &self,
        request: Request<v1::ListDeniedRequest>,
    ) -> Result<Response<v1::ListDeniedResponse>, Status> {
        let request = request.into_inner();
        let denied = self.hub.denied(Which {
            vms: selector(request.vms)?.as_ref(),
            network: &request.network,
        });
        Ok(Response::new(v1::ListDeniedResponse { denied }))
    }
}

impl Api {
    /// Has a zone changed, and gives it as it is then.
    async fn change_zone(
        &self,
        zone: v1::Zone,
        change: fn(v1::Zone) -> Command,
    ) -> Result<v1::Zone, Refusal> {
        let network = zone.network.clone();
        let mut sent = zone;
        let ack = self
            .hub
            .command(&network, |network| {
                network.clone_into(&mut sent.network);
                change(sent.clone())
            })
            .await?;
        let network = std::mem::take(&mut sent.network);
        Ok(v1::Zone {
            network,
            ..ack.zone.unwrap_or(sent)
        })
    }
}

fn check_zone(mut zone: v1::Zone) -> Result<v1::Zone, Refusal> {
    zone.name = check_zone_name("zone.name", &zone.name)?;
    if zone.records.len() > ZONE_RECORDS_MAX {
        return Err(Refusal::field(
            "zone.records",
            format!("are {} (at most {ZONE_RECORDS_MAX})", zone.records.len()),
        ));
    }
    let patterns = zone
        .records
        .iter()
        .filter(|record| !record.regexp.is_empty())
        .count();
    if patterns > ZONE_PATTERNS_MAX {
        return Err(Refusal::field(
            "zone.records",
            format!("have a regexp {patterns} times (at most {ZONE_PATTERNS_MAX} in all zones of a network)"),
        ));
    }
    for (index, record) in zone.records.iter_mut().enumerate() {
        check_record(&format!("zone.records[{index}]"), record, &zone.name)?;
    }
    if !zone.default_address.is_empty() {
        zone.default_address = check_address("zone.default_address", &zone.default_address)?;
    }
    Ok(zone)
}

fn check_record(field: &str, record: &mut v1::ZoneRecord, zone: &str) -> Result<(), Refusal> {
    if !record.name.is_empty() {
        let wrong = |e: NameError| Refusal::field(format!("{field}.name"), e.to_string());
        record.name = record_name(&record.name).map_err(wrong)?.to_string();
        if zone != ROOT {
            // With the zone's it must be a name as well.
            let _: Name = format!("{}.{zone}", record.name).parse().map_err(wrong)?;
        }
    }
    if !record.regexp.is_empty() {
        RecordPattern::new(&record.regexp)
            .map_err(|e| Refusal::field(format!("{field}.regexp"), format!("cannot be used: {e}")))?;
    }
    if !record.address.is_empty() {
        record.address = check_address(&format!("{field}.address"), &record.address)?;
    }
    Ok(())
}

fn check_zone_name(field: &str, text: &str) -> Result<String, Refusal> {
    match zone_name(text) {
        Ok(name) => Ok(zone_text(name.as_ref()).to_owned()),
        Err(NameError::Empty) => Err(Refusal::field(field, "is empty (the root is written .)")),
        Err(error) => Err(Refusal::field(field, error.to_string())),
    }
}

fn check_address(field: &str, text: &str) -> Result<String, Refusal> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.to_string()),
        Err(_) => Err(Refusal::field(field, format!("{text:?} is not an address"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, regexp: &str, address: &str) -> v1::ZoneRecord {
        v1::ZoneRecord {
            name: name.to_owned(),
            address: address.to_owned(),
            regexp: regexp.to_owned(),
        }
    }

    fn zone(name: &str, records: Vec<v1::ZoneRecord>) -> v1::Zone {
        v1::Zone {
            name: name.to_owned(),
            records,
            ..Default::default()
        }
    }

    #[test]
    fn a_zone_is_kept_in_one_form_or_refused_with_the_field() {
        let records = vec![
            record("Host.", "", "2001:DB8::1"),
            record("", "^A", ""),
            record("7", "", "10.0.0.1"),
        ];
        let checked = check_zone(zone("Lab.Internal.", records)).unwrap();
        let expected = vec![
            record("host", "", "2001:db8::1"),
            record("", "^A", ""),
            record("7", "", "10.0.0.1"),
        ];
        assert_eq!(checked, zone("lab.internal", expected));
        let root = zone(".", vec![record("7", "", ""), record("a.example", "", "")]);
        assert_eq!(check_zone(root.clone()), Ok(root));

        let long = "a.".repeat(120) + "a";
        let many = |count: usize, regexp: &str| vec![record("", regexp, "10.0.0.1"); count];
        for (wrong, expected) in [
            (zone("", vec![]), "zone.name is empty (the root is written .)"),
            (zone("a..b", vec![]), "zone.name the name begins"),
            (
                zone("a.test", vec![record("x", "", ""), record("", "(", "")]),
                "zone.records[1].regexp cannot be used: unclosed group",
            ),
            (
                zone("a.test", vec![record("", &"x".repeat(1_025), "")]),
                "zone.records[0].regexp cannot be used: it is 1025 bytes long (at most 1024)",
            ),
            (
                zone("a.test", vec![record("", "x", "y")]),
                "zone.records[0].address \"y\" is not an address",
            ),
            (
                zone(&long, vec![record(&long, "", "")]),
                "zone.records[0].name the name is 483 bytes long",
            ),
            (
                zone("a.test", many(4_097, "")),
                "zone.records are 4097 (at most 4096)",
            ),
            (
                zone("a.test", many(257, "x")),
                "zone.records have a regexp 257 times (at most 256 in all zones of a network)",
            ),
        ] {
            let Err(Refusal::Field { field, text }) = check_zone(wrong) else {
                panic!("taken: {expected}")
            };
            let said = format!("{field} {text}");
            assert!(said.starts_with(expected), "{said}");
        }
    }
}
