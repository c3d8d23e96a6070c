//! `VmService`: lists VMs and changes how they are treated.

use futures_util::StreamExt as _;
use tonic::{Request, Response, Status};
use vnet_proto::model::{Malformed, Mode};
use vnet_proto::v1;
use vnet_proto::v1::vm_service_server::VmService;

use super::{Api, Changes, Keys, actor, page, saved, selector, stream};
use crate::hub::{VmUpdate, Which};
use crate::refusal::Refusal;

/// Keys of the list's pages.
const KEYS: Keys = Keys {
    list: "vms",
    fits: |key| crate::fleet::check_name(key).is_ok(),
};

#[tonic::async_trait]
impl VmService for Api {
    async fn list_vms(
        &self,
        request: Request<v1::ListVmsRequest>,
    ) -> Result<Response<v1::ListVmsResponse>, Status> {
        let request = request.into_inner();
        let vms = self.hub.vms(Which {
            vms: selector(request.vms)?.as_ref(),
            network: &request.network,
        });
        let (vms, next_page_token) = page(vms, request.page_size, &request.page_token, KEYS, |vm| {
            vm.name.clone()
        })?;
        Ok(Response::new(v1::ListVmsResponse { vms, next_page_token }))
    }

    async fn get_vm(
        &self,
        request: Request<v1::GetVmRequest>,
    ) -> Result<Response<v1::GetVmResponse>, Status> {
        let vm = self.hub.vm(&request.into_inner().name)?;
        Ok(Response::new(v1::GetVmResponse { vm: Some(vm) }))
    }

    async fn update_vm(
        &self,
        request: Request<v1::UpdateVmRequest>,
    ) -> Result<Response<v1::UpdateVmResponse>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let mode = v1::Mode::try_from(request.mode)
            .map_err(|_| Malformed::Enum {
                field: "mode",
                value: request.mode,
            })
            .and_then(Option::<Mode>::try_from)
            .map_err(Refusal::from)?;
        if mode.is_none() && request.labels.is_empty() {
            return Err(Refusal::field("mode", "neither a mode nor labels are given").into());
        }
        let (vm, ticket, durable) = self.hub.update_vm(VmUpdate {
            name: &request.name,
            mode,
            labels: request.labels.into_iter().collect(),
            etag: &request.etag,
            actor: &actor,
        })?;
        saved(durable).await?;
        let cut = Some(self.hub.report(ticket).await);
        Ok(Response::new(v1::UpdateVmResponse { vm: Some(vm), cut }))
    }

    type CaptureVmStream = Changes<v1::CaptureVmResponse>;

    async fn capture_vm(
        &self,
        request: Request<v1::CaptureVmRequest>,
    ) -> Result<Response<Self::CaptureVmStream>, Status> {
        let actor = actor(&request);
        let request = request.into_inner();
        let (vm, filter) = (request.vm.clone(), request.filter.clone());
        let capture = self.hub.capture(request).await?;
        tracing::info!(vm, filter, actor, "packets of a VM are captured");
        // At once, so that the client knows that it has begun.
        let begun = futures_util::stream::once(async { Ok(v1::CaptureVmResponse::default()) });
        let rest = futures_util::stream::unfold(Some(capture), |capture| async move {
            let mut capture = capture?;
            match capture.next().await {
                Some(message) if message.end != i32::from(v1::CaptureEnd::Unspecified) => {
                    Some((Ok(message), None))
                }
                Some(message) => Some((Ok(message), Some(capture))),
                None => {
                    let lost =
                        Refusal::Unavailable("the dataplane was lost, and the capture with it".to_owned());
                    Some((Err(lost.into()), None))
                }
            }
        });
        Ok(Response::new(Box::pin(begun.chain(rest))))
    }

    type WatchVmsStream = Changes<v1::WatchVmsResponse>;

    async fn watch_vms(
        &self,
        request: Request<v1::WatchVmsRequest>,
    ) -> Result<Response<Self::WatchVmsStream>, Status> {
        let watch = self.hub.watch_vms(selector(request.into_inner().vms)?)?;
        let gap = |_| v1::WatchVmsResponse {
            change: v1::VmChange::Gap.into(),
            vm: None,
        };
        Ok(Response::new(stream(watch, gap)))
    }
}
