//! `DnsService`: zones, bindings and denied lookups. The dataplane serves the zones.

use std::net::IpAddr;

use tonic::{Request, Response, Status};
use vnet_proto::model::Name;
use vnet_proto::v1;
use vnet_proto::v1::command::Command;
use vnet_proto::v1::dns_service_server::DnsService;

use super::{Api, selector};
use crate::refusal::Refusal;

/// Records of one zone.
const RECORDS_MAX: usize = 10_000;

#[tonic::async_trait]
impl DnsService for Api {
    async fn list_zones(
        &self,
        request: Request<v1::ListZonesRequest>,
    ) -> Result<Response<v1::ListZonesResponse>, Status> {
        let zones = self.hub.zones(&request.into_inner().network);
        Ok(Response::new(v1::ListZonesResponse { zones }))
    }

    async fn set_zone(
        &self,
        request: Request<v1::SetZoneRequest>,
    ) -> Result<Response<v1::SetZoneResponse>, Status> {
        let zone = check_zone(request.into_inner().zone.unwrap_or_default())?;
        let network = zone.network.clone();
        let mut sent = zone;
        self.hub
            .command(&network, |network| {
                network.clone_into(&mut sent.network);
                Command::SetZone(sent.clone())
            })
            .await?;
        Ok(Response::new(v1::SetZoneResponse { zone: Some(sent) }))
    }

    async fn delete_zone(
        &self,
        request: Request<v1::DeleteZoneRequest>,
    ) -> Result<Response<v1::DeleteZoneResponse>, Status> {
        let request = request.into_inner();
        let name = check_name("name", &request.name)?.to_string();
        let zone = self
            .hub
            .zones(&request.network)
            .into_iter()
            .find(|zone| zone.name.trim_end_matches('.').eq_ignore_ascii_case(&name));
        let zone = zone.ok_or_else(|| Refusal::NotFound(format!("there is no zone {name}")))?;
        let network = zone.network.clone();
        let sent = zone.clone();
        self.hub.command(&network, |_| Command::DeleteZone(sent)).await?;
        Ok(Response::new(v1::DeleteZoneResponse { zone: Some(zone) }))
    }

    async fn list_bindings(
        &self,
        request: Request<v1::ListBindingsRequest>,
    ) -> Result<Response<v1::ListBindingsResponse>, Status> {
        let bindings = self.hub.bindings(selector(request.into_inner().vms)?.as_ref());
        Ok(Response::new(v1::ListBindingsResponse { bindings }))
    }

    async fn list_denied(
        &self,
        request: Request<v1::ListDeniedRequest>,
    ) -> Result<Response<v1::ListDeniedResponse>, Status> {
        let denied = self.hub.denied(selector(request.into_inner().vms)?.as_ref());
        Ok(Response::new(v1::ListDeniedResponse { denied }))
    }
}

fn check_zone(mut zone: v1::Zone) -> Result<v1::Zone, Refusal> {
    zone.name = check_name("zone.name", &zone.name)?.to_string();
    if zone.records.len() > RECORDS_MAX {
        return Err(Refusal::field(
            "zone.records",
            format!("are {} (at most {RECORDS_MAX})", zone.records.len()),
        ));
    }
    for (index, record) in zone.records.iter_mut().enumerate() {
        if !record.name.is_empty() {
            let full = format!("{}.{}", record.name.trim_end_matches('.'), zone.name);
            check_name(&format!("zone.records[{index}].name"), &full)?;
            record.name = record.name.trim_end_matches('.').to_ascii_lowercase();
        }
        if !record.address.is_empty() {
            record.address = check_address(&format!("zone.records[{index}].address"), &record.address)?;
        }
    }
    if !zone.default_address.is_empty() {
        zone.default_address = check_address("zone.default_address", &zone.default_address)?;
    }
    Ok(zone)
}

fn check_name(field: &str, text: &str) -> Result<Name, Refusal> {
    text.parse()
        .map_err(|e: vnet_proto::model::NameError| Refusal::field(field, e.to_string()))
}

fn check_address(field: &str, text: &str) -> Result<String, Refusal> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.to_string()),
        Err(_) => Err(Refusal::field(field, format!("{text:?} is not an address"))),
    }
}
