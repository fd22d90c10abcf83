#!/usr/bin/env node
// A stand-in for CouchDB where its packages cannot be had: express-pouchdb's documents, views and
// indexes over LevelDB, behind accounts and permissions that answer as CouchDB 3 does when it is set to
// require a valid user. express-pouchdb has those too, but one anonymous request for a new database
// ends its process, so this file does not use them.
'use strict';

const crypto = require('node:crypto');
const fs = require('node:fs');
const http = require('node:http');
const https = require('node:https');
const path = require('node:path');
const { promisify } = require('node:util');
const vm = require('node:vm');
const express = require('express');
const expressPouchDB = require('express-pouchdb');
const PouchDB = require('pouchdb');
const { version } = require('./package.json');

const HELP = `Usage: server.js

Set by the environment:
  COUCHDB_DATA_DIR             where the databases lie; required
  COUCHDB_ADMIN_USER           name of the server's admin (admin)
  COUCHDB_ADMIN_PASSWORD_FILE  file that holds the admin's password; required
  COUCHDB_BIND_ADDRESS         address to listen on (127.0.0.1)
  COUCHDB_PORT                 port to listen on (5984)
  COUCHDB_MAX_DOCUMENT_SIZE    largest document in bytes (8000000)
  COUCHDB_LOCKOUT_SECONDS      how long failed logins are remembered; five lock a user out (300)
  COUCHDB_LOG_LEVEL            error, or info for a line a request (error)
  COUCHDB_TLS_CERTIFICATE_FILE certificate and its chain; with it and its key, only https is spoken
  COUCHDB_TLS_KEY_FILE         the certificate's key

Certificate and key are read again when they change, and on SIGHUP.
`;

const DATABASE_NAME = /^[a-z][a-z0-9_$()+-]*$/;
const SYSTEM_DATABASES = ['_users', '_replicator', '_global_changes'];
const USER_PREFIX = 'org.couchdb.user:';
const SECURITY_ID = '_local/_security';
const ADMINS_ONLY = { admins: { names: [], roles: ['_admin'] }, members: { names: [], roles: ['_admin'] } };
const ITERATIONS = 50000;
// https://docs.couchdb.org/en/stable/config/auth.html: chttpd_auth_lockout
const LOCKOUT_THRESHOLD = 5;
const MAX_REQUEST_SIZE = 64 * 1024 * 1024;
const CERTIFICATE_CHECK_INTERVAL = 5000; // milliseconds

const pbkdf2 = promisify(crypto.pbkdf2);

class Refusal extends Error {
  constructor(status, error, reason) {
    super(reason);
    Object.assign(this, { status, error });
  }
}

const unauthorized = (reason) => new Refusal(401, 'unauthorized', reason);
const notDatabaseAdmin = () => new Refusal(403, 'forbidden', 'You are not a db or server admin.');
const lockedOut = () =>
  new Refusal(403, 'forbidden', 'Account is temporarily locked due to multiple authentication failures');
const hidden = () => new Refusal(403, 'forbidden', 'Permissions are set at _security.');
const notServerAdmin = () => unauthorized('You are not a server admin.');

function fail(message) {
  process.stderr.write(`couchdb-standin: ${message}\n`);
  process.exit(1);
}

function readSettings(env) {
  const required = (name) => env[name] || fail(`${name} is not set.\n\n${HELP}`);
  const number = (name, value) => {
    const parsed = Number(env[name] || value);
    return Number.isInteger(parsed) && parsed > 0 ? parsed : fail(`${name} must be a positive number.`);
  };
  const passwordFile = required('COUCHDB_ADMIN_PASSWORD_FILE');
  let adminPassword;
  try {
    adminPassword = fs.readFileSync(passwordFile, 'utf8').trim();
  } catch (error) {
    fail(`cannot read the admin's password: ${error.message}`);
  }
  if (!adminPassword) fail(`${passwordFile} is empty: it must hold the admin's password.`);
  return {
    dataDir: required('COUCHDB_DATA_DIR'),
    adminUser: env.COUCHDB_ADMIN_USER || 'admin',
    adminPassword,
    bindAddress: env.COUCHDB_BIND_ADDRESS || '127.0.0.1',
    port: number('COUCHDB_PORT', 5984),
    maxDocumentSize: number('COUCHDB_MAX_DOCUMENT_SIZE', 8000000),
    lockoutSeconds: number('COUCHDB_LOCKOUT_SECONDS', 300),
    logLevel: env.COUCHDB_LOG_LEVEL || 'error',
    tls: readTlsSettings(env),
  };
}

function readTlsSettings(env) {
  const certificate = env.COUCHDB_TLS_CERTIFICATE_FILE;
  const key = env.COUCHDB_TLS_KEY_FILE;
  if (Boolean(certificate) !== Boolean(key)) fail('set both COUCHDB_TLS_CERTIFICATE_FILE and COUCHDB_TLS_KEY_FILE.');
  return certificate ? { certificate, key } : undefined;
}

// The databases by name, opened once each. Asks before it opens: opening makes a database.
class Databases {
  constructor(dataDir) {
    fs.mkdirSync(dataDir, { recursive: true });
    this.Pouch = PouchDB.defaults({ prefix: path.join(dataDir, path.sep) });
    this.handles = new Map();
    this.Pouch.on('destroyed', (name) => this.handles.delete(name));
  }

  async exists(name) {
    return (await this.Pouch.allDbs()).includes(name);
  }

  async open(name) {
    if (!(await this.exists(name))) throw new Refusal(404, 'not_found', 'Database does not exist.');
    if (!this.handles.has(name)) this.handles.set(name, new this.Pouch(name));
    return this.handles.get(name);
  }

  async read(name, id) {
    try {
      return await (await this.open(name)).get(id);
    } catch (error) {
      if (error.status === 404) return undefined;
      throw error;
    }
  }

  async security(name) {
    const stored = ((await this.read(name, SECURITY_ID)) || {}).security || ADMINS_ONLY;
    const complete = (part = {}) => ({ names: part.names || [], roles: part.roles || [] });
    return { admins: complete(stored.admins), members: complete(stored.members) };
  }

  async setSecurity(name, security) {
    const previous = await this.read(name, SECURITY_ID);
    const database = await this.open(name);
    await database.put({ _id: SECURITY_ID, _rev: previous && previous._rev, security });
  }
}

// The validation functions of design documents, which every document that is written has to pass.
class Validation {
  constructor(databases) {
    this.databases = databases;
    this.functions = new Map();
  }

  forget(name) {
    this.functions.delete(name);
  }

  load(name) {
    if (!this.functions.has(name)) {
      // As a promise: requests that come meanwhile wait for the same one.
      const loading = this.compile(name);
      loading.catch(() => this.forget(name));
      this.functions.set(name, loading);
    }
    return this.functions.get(name);
  }

  async compile(name) {
    const database = await this.databases.open(name);
    const { rows } = await database.allDocs({ startkey: '_design/', endkey: '_design0', include_docs: true });
    return rows.filter(({ doc }) => doc.validate_doc_update !== undefined).map(({ doc }) => {
      const source = String(doc.validate_doc_update).replace(/;\s*$/, '');
      return { call: vm.runInNewContext(`(${source})`), readsOld: readsSecondParameter(source) };
    });
  }

  // For each document why it is refused, or undefined.
  async refusals(name, documents, user) {
    const functions = await this.load(name);
    if (functions.length === 0) return documents.map(() => undefined);
    const context = { db: name, name: user.name, roles: user.roles };
    const security = await this.databases.security(name);
    const readsOld = functions.some((each) => each.readsOld);
    return Promise.all(documents.map(async (document) => {
      const id = String((document || {})._id || '');
      if (id.startsWith('_design/') || id.startsWith('_local/')) return undefined;
      const old = (readsOld && id && await this.databases.read(name, id)) || null;
      try {
        for (const { call } of functions) call(document, old, context, security);
        return undefined;
      } catch (error) {
        const { forbidden, unauthorized: stranger } = error || {};
        if (forbidden !== undefined) return new Refusal(403, 'forbidden', String(forbidden));
        if (stranger !== undefined) return unauthorized(String(stranger));
        return new Refusal(500, 'compilation_error', String(error));
      }
    }));
  }
}

// Whether a function may look at the stored document. Reading it for each one that is written takes
// longer than everything else here, and few functions ask for it.
function readsSecondParameter(source) {
  const [, parameters = ''] = /\(([^)]*)\)/.exec(source) || [];
  const [, second] = parameters.split(',').map((parameter) => parameter.trim());
  const words = source.match(/[\w$]+/g) || [];
  return /\b(arguments|eval)\b/.test(source) || words.filter((word) => word === second).length > 1;
}

// Failed logins, by the address that they come from, the user and the salt of the password: of a
// password that is changed, none has failed yet. A login that succeeds takes none of them back.
class Lockout {
  constructor(seconds) {
    this.milliseconds = seconds * 1000;
    this.failures = new Map();
  }

  failed(key) {
    const now = Date.now();
    for (const [each, { since }] of this.failures) {
      if (now - since <= this.milliseconds) break;
      this.failures.delete(each);
    }
    const known = this.failures.get(key);
    if (known) known.count += 1;
    else this.failures.set(key, { count: 1, since: now });
  }

  holds(key) {
    const { count, since } = this.failures.get(key) || { count: 0 };
    return count >= LOCKOUT_THRESHOLD && Date.now() - since <= this.milliseconds;
  }
}

// Who a request comes from: the admin of the settings, or a document of _users.
class Accounts {
  constructor(settings, databases) {
    this.settings = settings;
    this.databases = databases;
    // Deriving a key takes tens of milliseconds by design, so what has been verified is remembered,
    // as a keyed hash that is of no use to whoever sees it.
    this.secret = crypto.randomBytes(32);
    this.verified = new Set();
    this.lockout = new Lockout(settings.lockoutSeconds);
  }

  digest(...parts) {
    return crypto.createHmac('sha256', this.secret).update(JSON.stringify(parts)).digest('base64');
  }

  async authenticate(header, address) {
    if (!header) return { name: null, roles: [] };
    const [scheme, encoded = ''] = header.split(' ');
    if (scheme.toLowerCase() !== 'basic') throw unauthorized('Only basic authentication is supported.');
    const [name, ...rest] = Buffer.from(encoded, 'base64').toString('utf8').split(':');
    const password = rest.join(':');
    const isAdmin = name === this.settings.adminUser;
    const user = isAdmin ? undefined : await this.databases.read('_users', USER_PREFIX + name);
    if (isAdmin || user) {
      const key = this.digest(address, name, isAdmin ? '' : user.salt);
      if (this.lockout.holds(key)) throw lockedOut();
      const isRight = isAdmin ? this.matchesAdmin(password) : await this.matches(user, password);
      if (isRight) return { name, roles: isAdmin ? ['_admin'] : user.roles || [] };
      this.lockout.failed(key);
    }
    throw unauthorized('Name or password is incorrect.');
  }

  matchesAdmin(password) {
    const given = Buffer.from(this.digest(password));
    const expected = Buffer.from(this.digest(this.settings.adminPassword));
    return crypto.timingSafeEqual(given, expected);
  }

  async matches(user, password) {
    if (!user.derived_key || !user.salt) return false;
    const seen = this.digest(user.name, user.derived_key, password);
    if (this.verified.has(seen)) return true;
    const derived = await deriveKey(password, user.salt, user.iterations);
    const given = Buffer.from(derived);
    const expected = Buffer.from(user.derived_key);
    if (given.length !== expected.length || !crypto.timingSafeEqual(given, expected)) return false;
    if (this.verified.size > 1000) this.verified.clear();
    this.verified.add(seen);
    return true;
  }
}

async function deriveKey(password, salt, iterations) {
  return (await pbkdf2(password, salt, iterations, 32, 'sha256')).toString('hex');
}

async function hashPassword(document) {
  if (typeof document !== 'object' || document === null || document.password === undefined) return document;
  const { password, ...kept } = document;
  const salt = crypto.randomBytes(16).toString('hex');
  return {
    ...kept,
    password_scheme: 'pbkdf2',
    pbkdf2_prf: 'sha256',
    salt,
    iterations: ITERATIONS,
    derived_key: await deriveKey(String(password), salt, ITERATIONS),
  };
}

function requireObject(body) {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw new Refusal(400, 'bad_request', 'Request body must be a JSON object');
  }
}

const isAdmin = (user) => user.roles.includes('_admin');
const isIn = (user, part) =>
  part.names.includes(user.name) || part.roles.some((role) => user.roles.includes(role));

function needsDatabaseAdmin(method, action = '') {
  if (['GET', 'HEAD'].includes(method)) return false;
  // An encoded slash leaves "_design/name" in one piece.
  const [kind] = action.split('/');
  return ['_security', '_index', '_compact', '_view_cleanup', '_design', '_temp_view'].includes(kind);
}

const isWrite = (request) => ['DELETE', 'POST', 'PUT'].includes(request.method);

const pathId = (request) => request.segments.slice(1).join('/');

// The documents that a request writes, each with the id that express-pouchdb will give it.
function writtenDocuments(request) {
  const { body, method, query } = request;
  const id = pathId(request);
  if (!isWrite(request) || (id === '' && method !== 'POST')) return [];
  if (id === '_bulk_docs') return Array.isArray(body.docs) ? body.docs : [];
  if (method === 'DELETE') return [{ _id: id, _rev: query.rev, _deleted: true }];
  if (method === 'POST' && id.startsWith('_')) return [];
  return [{ ...body, _id: (body || {})._id || query.id || id }];
}

function splitPath(pathname) {
  try {
    // A plus stands for a blank here, as it does in CouchDB.
    return pathname.replace(/^\/|\/$/g, '').replaceAll('+', ' ').split('/').map(decodeURIComponent);
  } catch {
    throw new Refusal(400, 'bad_request', 'The path is not valid percent-encoding.');
  }
}

// What the request's user may do, as CouchDB decides it.
async function authorize(databases, user, request) {
  const [database, action] = request.segments;
  const { method } = request;
  if (user.name === null) throw unauthorized('Authentication required.');
  if (!['GET', 'HEAD', 'PUT', 'POST', 'DELETE'].includes(method)) {
    if (method === 'COPY' && request.headers.destination === undefined) {
      throw new Refusal(400, 'bad_request', 'Destination header is mandatory for COPY.');
    }
    throw new Refusal(405, 'method_not_allowed', 'Only GET, HEAD, PUT, POST and DELETE are allowed.');
  }
  if (database === '' && !['GET', 'HEAD'].includes(method)) {
    throw new Refusal(405, 'method_not_allowed', 'Only GET,HEAD allowed');
  }
  if (pathId(request) === SECURITY_ID) throw hidden();
  if (['_session', '_uuids'].includes(database)) return;
  // express-pouchdb cleans a database's name before it looks for it, so only a name that is exactly
  // right may get there: otherwise "secret%2F" would pass here as unknown and open "secret".
  const creates = action === undefined && method === 'PUT';
  const isServerLevel = /^_[a-z_]+$/.test(database) && !SYSTEM_DATABASES.includes(database);
  if (!creates && !isServerLevel) await databases.open(database);
  request.mayDesign = isAdmin(user);
  if (isAdmin(user)) return;
  if (database.startsWith('_') || (action === undefined && ['PUT', 'DELETE'].includes(method))) {
    throw notServerAdmin();
  }
  const security = await databases.security(database);
  const isDatabaseAdmin = isIn(user, security.admins);
  const open = security.members.names.length + security.members.roles.length === 0;
  if (!isDatabaseAdmin && !open && !isIn(user, security.members)) {
    throw new Refusal(403, 'forbidden', 'You are not allowed to access this db.');
  }
  if (needsDatabaseAdmin(method, action) && !isDatabaseAdmin) throw notDatabaseAdmin();
  request.mayDesign = isDatabaseAdmin;
}

function buildGate(settings, databases) {
  const accounts = new Accounts(settings, databases);
  const validation = new Validation(databases);
  const gate = express.Router({ caseSensitive: true });
  const handled = (handler) => (request, response, next) =>
    Promise.resolve(handler(request, response, next)).catch(next);
  const json = express.json({ limit: MAX_REQUEST_SIZE, strict: false });

  if (settings.logLevel === 'info') {
    gate.use((request, response, next) => {
      const start = process.hrtime.bigint();
      response.on('finish', () => {
        const milliseconds = Number((process.hrtime.bigint() - start) / 1000000n);
        const name = (request.user || {}).name || '-';
        console.log(`${name} ${request.method} ${request.path} ${response.statusCode} ${milliseconds} ms`);
      });
      next();
    });
  }

  gate.get('/_up', (request, response) => response.json({ status: 'ok', seeds: {} }));

  gate.use(handled(async (request, response, next) => {
    request.segments = splitPath(request.path);
    request.user = await accounts.authenticate(
      request.headers.authorization, request.socket.remoteAddress,
    );
    next();
  }));

  gate.get('/', (request, response) => response.json({
    couchdb: 'Welcome',
    version,
    vendor: { name: 'CouchDB stand-in for iot-pipeline, on express-pouchdb' },
  }));

  gate.use(handled(async (request, response, next) => {
    await authorize(databases, request.user, request);
    next();
  }));

  gate.get('/_session', (request, response) => response.json({
    ok: true,
    userCtx: request.user,
    info: { authentication_handlers: ['default'], authenticated: 'default' },
  }));

  gate.get('/_uuids', (request, response) => {
    const count = Math.min(Number(request.query.count) || 1, 1000);
    response.json({ uuids: Array.from({ length: count }, () => crypto.randomBytes(16).toString('hex')) });
  });

  gate.put('/:database', (request, response, next) => {
    const [database] = request.segments;
    if (SYSTEM_DATABASES.includes(database) || DATABASE_NAME.test(database)) return next();
    throw new Refusal(400, 'illegal_database_name', `'${database}' is no name for a database: use lowercase ` +
      'letters, digits and any of _$()+-, and begin with a letter.');
  });

  gate.get('/:database/_security', handled(async (request, response) => {
    response.json(await databases.security(request.params.database));
  }));
  gate.put('/:database/_security', json, handled(async (request, response) => {
    requireObject(request.body);
    await databases.setSecurity(request.params.database, request.body);
    response.json({ ok: true });
  }));

  // Only those who may write design documents change what validates the others.
  gate.use((request, response, next) => {
    if (request.mayDesign) response.on('finish', () => validation.forget(request.segments[0]));
    next();
  });

  // The rest is express-pouchdb's, which takes a body that is parsed already as it is. Attachments
  // are no JSON, whatever their type says.
  gate.use(handled(async (request, response, next) => {
    const [database, action = '', attachment] = request.segments;
    if (attachment === undefined || action.startsWith('_')) return json(request, response, next);
    if (isWrite(request)) {
      const [refusal] = await validation.refusals(database, [{ _id: action }], request.user);
      if (refusal) throw refusal;
    }
    return next('router');
  }));
  gate.use(handled(async (request, response, next) => {
    const [database, action] = request.segments;
    const { body } = request;
    if (['POST', 'PUT'].includes(request.method) && action !== undefined) requireObject(body);
    const documents = action === '_bulk_docs' && Array.isArray(body.docs) ? body.docs : [body];
    if (action === '_bulk_docs') documents.forEach(requireObject);
    // The path names the document, whatever its body says.
    const isDocument = action !== undefined && !action.startsWith('_design');
    if (request.method === 'PUT' && isDocument) body._id = pathId(request);
    for (const document of documents) {
      const id = String((document || {})._id || '');
      if (id === SECURITY_ID) throw hidden();
      if (id.startsWith('_design/') && !request.mayDesign) throw notDatabaseAdmin();
      if (Buffer.byteLength(JSON.stringify(document) || '') > settings.maxDocumentSize) {
        throw new Refusal(413, 'document_too_large', id || action);
      }
    }
    if (database === '_users' && body) {
      if (Array.isArray(body.docs)) body.docs = await Promise.all(body.docs.map(hashPassword));
      else request.body = await hashPassword(body);
    }
    next();
  }));
  gate.use(handled(async (request, response, next) => {
    const [database, action] = request.segments;
    const documents = writtenDocuments(request);
    const refusals = documents.length > 0 ? await validation.refusals(database, documents, request.user) : [];
    if (action !== '_bulk_docs' || !Array.isArray(request.body.docs)) {
      if (refusals.some(Boolean)) throw refusals[0];
      return next();
    }
    const options = 'new_edits' in request.body ? { new_edits: request.body.new_edits } : {};
    const allowed = documents.filter((_, index) => !refusals[index]);
    const row = (document, error, reason) => ({ id: document._id, error, reason });
    let stored;
    try {
      stored = await (await databases.open(database)).bulkDocs(allowed, options);
    } catch (error) {
      if (error.name === 'doc_validation') throw new Refusal(400, error.name, error.message);
      if (error.status < 500) throw error;
      // What the disk does not take CouchDB tells of each document.
      console.error(`${request.method} ${request.path}: ${error.stack || error}`);
      const reason = error.message || String(error);
      return response.status(500).json(documents.map((each) => row(each, 'internal_server_error', reason)));
    }
    return response.status(201).json(documents.map((document, index) => {
      const failure = refusals[index];
      if (failure) return row(document, failure.error, failure.message);
      const result = stored.shift();
      return result && result.error ? { id: result.id, error: result.name, reason: result.message } : result;
    }).filter(Boolean));
  }));
  return gate;
}

function buildServer(settings, databases) {
  const app = express();
  app.disable('x-powered-by');
  app.use(buildGate(settings, databases));
  app.use(expressPouchDB(databases.Pouch, {
    mode: 'minimumForPouchDB',
    overrideMode: { include: ['routes/find', 'routes/ddoc-info'], exclude: ['routes/session-stub'] },
  }));

  // Express knows an error handler by its four parameters.
  // eslint-disable-next-line no-unused-vars
  app.use((error, request, response, next) => {
    const status = error.status || 500;
    if (status === 500) console.error(`${request.method} ${request.path}: ${error.stack || error}`);
    if (response.headersSent) return response.end();
    if (status === 401) response.set('WWW-Authenticate', 'Basic realm="CouchDB"');
    const name = error.error || (status === 400 ? 'bad_request' : error.name || 'internal_server_error');
    response.status(status).json({ error: name, reason: error.message });
  });
  return app;
}

// A server that takes up a new certificate without losing a connection.
function serveTls({ certificate, key }, app) {
  const read = () => ({
    cert: fs.readFileSync(certificate), key: fs.readFileSync(key), minVersion: 'TLSv1.2',
  });
  let server;
  try {
    server = https.createServer(read(), app);
  } catch (error) {
    fail(`cannot use ${certificate} with ${key}: ${error.message}`);
  }
  const renew = () => {
    try {
      server.setSecureContext(read());
      console.log(`read ${certificate} and ${key} again`);
    } catch (error) {
      // Half of a pair that is being replaced; the other half will bring us here again.
      console.error(`keep the certificate before: ${error.message}`);
    }
  };
  for (const file of [certificate, key]) {
    fs.watchFile(file, { interval: CERTIFICATE_CHECK_INTERVAL, persistent: false }, renew);
  }
  process.on('SIGHUP', renew);
  return server;
}

function main() {
  if (process.argv.length > 2) {
    process.stdout.write(HELP);
    process.exit(['-h', '--help'].includes(process.argv[2]) ? 0 : 1);
  }
  const settings = readSettings(process.env);
  const databases = new Databases(settings.dataDir);

  // A request that trips over a fault in a library must not take the other clients' database away.
  for (const event of ['uncaughtException', 'unhandledRejection']) {
    process.on(event, (error) => console.error(`${event}: ${(error && error.stack) || error}`));
  }

  const app = buildServer(settings, databases);
  const server = settings.tls ? serveTls(settings.tls, app) : http.createServer(app);
  server.listen(settings.port, settings.bindAddress);
  server.on('error', (error) => {
    fail(`cannot listen on ${settings.bindAddress}:${settings.port}: ${error.message}`);
  });
  server.on('listening', () => {
    console.log(`CouchDB stand-in ${version} listens on ${settings.tls ? 'https' : 'http'}://${settings.bindAddress}:${server.address().port}`);
  });
  for (const signal of ['SIGTERM', 'SIGINT']) {
    process.on(signal, () => {
      server.close(() => process.exit(0));
      server.closeIdleConnections();
      setTimeout(() => server.closeAllConnections(), 5000).unref();
    });
  }
}

main();
