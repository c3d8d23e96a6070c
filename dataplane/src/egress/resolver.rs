//! stub
#[derive(Clone)] pub struct Resolver;
impl Resolver { pub async fn resolve(&self, _q: Vec<u8>) -> Result<Vec<u8>, std::io::Error> { Ok(vec![]) } }
