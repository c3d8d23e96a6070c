//! `/services/dns/{all,add,remove,remove/record}`: local zones, in gvproxy's words.

use std::net::IpAddr;

use hyper::StatusCode;
use serde::Serialize;
use tonic::Code;
use vnet_proto::v1;

use super::Services;
use super::answer::Answer;
use super::control::CallError;
use super::json::{Json, Object};
use crate::client::unary;

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    name: String,
    /// None is `null`, as a list in Go that was never made.
    records: Option<Vec<ListedRecord>>,
    #[serde(rename = "DefaultIP")]
    default_ip: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ListedRecord {
    name: String,
    #[serde(rename = "IP")]
    ip: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    regexp: String,
}

impl Services {
    /// Lists the zones, in order of precedence.
    pub(super) async fn list_zones(&self) -> Result<Answer, Answer> {
        let zones: Vec<Listed> = self.zones().await?.into_iter().map(listed).collect();
        Ok(Answer::json(&zones))
    }

    /// Adds a zone. To one that is there its records are added, before those that it has, and its default replaces
    /// that one's, even by none.
    pub(super) async fn add_zone(&self, body: &[u8]) -> Result<Answer, Answer> {
        let mut zone = read_zone(body, self.control.network()).map_err(Answer::bad_request)?;
        if zone.name.is_empty() {
            ROOT.clone_into(&mut zone.name);
        }
        let request = v1::SetZoneRequest {
            zone: Some(zone),
            prepend_records: true,
        };
        self.control
            .call(|client| async move { client.dns().set_zone(unary(request)).await })
            .await?;
        Ok(Answer::done())
    }

    /// Removes a zone.
    pub(super) async fn remove_zone(&self, body: &[u8]) -> Result<Answer, Answer> {
        let zone = read_zone(body, self.control.network()).map_err(Answer::bad_request)?;
        // Every name's is removed by its name alone, not by leaving one out.
        if zone.name.is_empty() {
            return Err(Answer::bad_request(NO_NAME));
        }
        let request = v1::DeleteZoneRequest {
            network: zone.network,
            name: zone.name,
        };
        let deleted = self
            .control
            .call(|client| async move { client.dns().delete_zone(unary(request)).await })
            .await;
        match deleted {
            Ok(_) => Ok(Answer::done()),
            Err(CallError::Refused(status)) if status.code() == Code::NotFound => {
                Err(Answer::error(StatusCode::NOT_FOUND, "zone not found"))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes from a zone the records of a name; with an address, those that have it.
    pub(super) async fn remove_record(&self, body: &[u8]) -> Result<Answer, Answer> {
        let read = || -> Result<(String, String, String), String> {
            let value = Json::read(body)?;
            let request = Object::of(&value, "removeRecordRequest")?;
            let record = request.object("record", "types.Record")?;
            Ok((
                request.text("name")?,
                record.text("Name")?,
                address(&record, "IP")?,
            ))
        };
        let (name, record, ip) = read().map_err(Answer::bad_request)?;
        if name.is_empty() {
            return Err(Answer::bad_request(NO_NAME));
        }
        if record.is_empty() {
            return Err(Answer::bad_request("record name is required"));
        }
        let there = self.zones().await?;
        if !there.iter().any(|there| is_same(&there.name, &name)) {
            return Err(Answer::bad_request("zone not found"));
        }
        let request = v1::DeleteZoneRecordRequest {
            network: self.control.network().to_owned(),
            zone: name,
            record: Some(v1::ZoneRecord {
                name: record,
                address: ip,
                regexp: String::new(),
            }),
        };
        let deleted = self
            .control
            .call(|client| async move { client.dns().delete_zone_record(unary(request)).await })
            .await;
        match deleted {
            Ok(_) => Ok(Answer::done()),
            Err(CallError::Refused(status)) if status.code() == Code::NotFound => {
                Err(Answer::bad_request("record not found"))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn zones(&self) -> Result<Vec<v1::Zone>, Answer> {
        let request = v1::ListZonesRequest {
            network: self.control.network().to_owned(),
        };
        let list = self
            .control
            .call(|client| async move { client.dns().list_zones(unary(request)).await })
            .await?;
        Ok(list.zones)
    }
}

/// The root, which every name is in. gvproxy's has no name.
const ROOT: &str = ".";
/// What is said where a zone is to be removed and none is named.
const NO_NAME: &str = "name is required (the zone that every name is in is \".\")";

/// A zone as it is sent.
fn read_zone(body: &[u8], network: &str) -> Result<v1::Zone, String> {
    let value = Json::read(body)?;
    let zone = Object::of(&value, "Zone")?;
    let records = zone.list("Records", "types.Record")?;
    let records = records.iter().map(read_record).collect::<Result<_, String>>()?;
    Ok(v1::Zone {
        network: network.to_owned(),
        name: zone.text("Name")?,
        records,
        default_address: address(&zone, "DefaultIP")?,
    })
}

fn read_record(record: &Object<'_>) -> Result<v1::ZoneRecord, String> {
    Ok(v1::ZoneRecord {
        name: record.text("Name")?,
        address: address(record, "IP")?,
        regexp: record.text_as("Regexp", "*regexp.Regexp")?,
    })
}

/// An address in its one form, or nothing.
fn address(object: &Object<'_>, field: &str) -> Result<String, String> {
    let text = object.text_as(field, "net.IP")?;
    if text.is_empty() {
        return Ok(text);
    }
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.to_canonical().to_string()),
        Err(_) => Err(format!("invalid IP address: {text}")),
    }
}

fn is_same(one: &str, other: &str) -> bool {
    one.trim_end_matches('.')
        .eq_ignore_ascii_case(other.trim_end_matches('.'))
}

/// A zone as it is listed: with the last dot, as gvproxy's own are, and the root without a name.
fn listed(zone: v1::Zone) -> Listed {
    let records: Vec<ListedRecord> = zone
        .records
        .into_iter()
        .map(|record| ListedRecord {
            name: record.name,
            ip: record.address,
            regexp: record.regexp,
        })
        .collect();
    let name = zone.name.trim_end_matches('.');
    Listed {
        name: if name.is_empty() {
            String::new()
        } else {
            format!("{name}.")
        },
        records: Some(records).filter(|records| !records.is_empty()),
        default_ip: zone.default_address,
    }
}
