import de.bwaldvogel.mongo.MongoCollection;
import de.bwaldvogel.mongo.MongoDatabase;
import de.bwaldvogel.mongo.MongoServer;
import de.bwaldvogel.mongo.MongoVersion;
import de.bwaldvogel.mongo.ServerVersion;
import de.bwaldvogel.mongo.backend.CollectionOptions;
import de.bwaldvogel.mongo.backend.CursorRegistry;
import de.bwaldvogel.mongo.backend.QueryResult;
import de.bwaldvogel.mongo.backend.h2.H2Backend;
import de.bwaldvogel.mongo.backend.h2.H2Collection;
import de.bwaldvogel.mongo.backend.h2.H2Database;
import de.bwaldvogel.mongo.bson.Document;
import io.netty.channel.Channel;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.PrivateKey;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Base64;
import java.util.List;
import java.util.Set;
import java.util.Spliterators;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;
import org.h2.mvstore.Cursor;
import org.h2.mvstore.MVMap;
import org.h2.mvstore.MVStore;

/**
 * The lab's stand-in for MongoDB: mongo-java-server on one file, with settings from the environment.
 *
 * <p>What it adds is what the pipeline relies on in MongoDB and that server lacks: an answered write survives SIGKILL,
 * a document is found by its _id whatever else the query asks for, ranges of _id are read in order, and a reader never
 * sees half of a change.
 */
public final class MongodbStandin {

  private MongodbStandin() {}

  public static void main(String[] arguments) throws Exception {
    Path folder = Files.createDirectories(Path.of(setting("MONGODB_DATA_DIR", "mongodb-data")));
    MongoServer server = new MongoServer(new Backend(open(folder.resolve("documents.mv"))));
    String certificate = setting("MONGODB_TLS_CERTIFICATE_FILE", "");
    if (!certificate.isEmpty()) {
      PrivateKey key = readKey(Path.of(setting("MONGODB_TLS_KEY_FILE", "")));
      server.enableSsl(key, null, readCertificates(Path.of(certificate)));
    }
    String address = setting("MONGODB_BIND_ADDRESS", "127.0.0.1");
    int port = Integer.parseInt(setting("MONGODB_PORT", "27017"));
    try {
      server.bind(address, port);
    } catch (Exception error) {
      System.err.println("cannot listen on " + address + " port " + port + ": " + error.getMessage());
      // The server's threads would go on.
      System.exit(1);
    }
    Thread end =
        new Thread(
            () -> {
              server.shutdownNow();
              // Otherwise Java ends with 143, as if it had not heard SIGTERM.
              Runtime.getRuntime().halt(0);
            });
    Runtime.getRuntime().addShutdownHook(end);
    System.out.println("listening on " + address + " port " + port + (certificate.isEmpty() ? "" : " with TLS"));
  }

  private static String setting(String name, String otherwise) {
    String value = System.getenv(name);
    return value == null || value.isEmpty() ? otherwise : value;
  }

  /** Opens the store so that it commits when it is told to, and never in the middle of a command. */
  private static MVStore open(Path file) {
    MVStore store =
        new MVStore.Builder().fileName(file.toString()).autoCommitDisabled().autoCommitBufferSize(0).open();
    // What the newest version does not need is written over after that time, in which any reader is done.
    store.setVersionsToKeep(0);
    store.setRetentionTime(10_000);
    return store;
  }

  private static X509Certificate[] readCertificates(Path file) throws IOException, GeneralSecurityException {
    try (InputStream content = Files.newInputStream(file)) {
      return CertificateFactory.getInstance("X.509").generateCertificates(content).toArray(new X509Certificate[0]);
    }
  }

  /** Reads a key in PKCS #8. */
  private static PrivateKey readKey(Path file) throws IOException, GeneralSecurityException {
    String base64 = Files.readString(file).replaceAll("-----[^-]+-----|\\s", "");
    PKCS8EncodedKeySpec content = new PKCS8EncodedKeySpec(Base64.getDecoder().decode(base64));
    for (String algorithm : List.of("EC", "RSA", "EdDSA")) {
      try {
        return KeyFactory.getInstance(algorithm).generatePrivate(content);
      } catch (GeneralSecurityException another) {
        continue;
      }
    }
    throw new GeneralSecurityException(file + " holds no key in PKCS #8 of EC, RSA or EdDSA");
  }

  private static final class Backend extends H2Backend {

    private static final Set<String> READS =
        Set.of("ismaster", "ping", "find", "getmore", "killcursors", "count", "distinct", "aggregate", "listcollections");

    /** So many documents of a megabyte stay below the 48 MB that a client takes in one reply. */
    private static final int MOST_DOCUMENTS_AT_ONCE = 40;

    /** Each commit writes whole pages anew. Without this a file of small writes becomes 17 times its documents. */
    private static final int COMMITS_UNTIL_COMPACTED = 250;

    private static final int FILL_PERCENT = 50;
    private static final int COMPACTED_BYTES = 16 * 1024 * 1024;

    private long commits;

    Backend(MVStore store) {
      super(store);
      version(new Version());
    }

    @Override
    protected MongoDatabase openOrCreateDatabase(String name) {
      return new Database(name);
    }

    @Override
    public Document handleCommand(Channel channel, String database, String command, Document query) {
      String name = command.toLowerCase();
      if (name.equals("find") || name.equals("getmore")) {
        int wanted = ((Number) query.getOrDefault("batchSize", 0)).intValue();
        query.put("batchSize", wanted == 0 ? MOST_DOCUMENTS_AT_ONCE : Math.min(wanted, MOST_DOCUMENTS_AT_ONCE));
      }
      try {
        return READS.contains(name) ? super.handleCommand(channel, database, command, query)
            : commit(channel, database, command, query);
      } catch (RuntimeException error) {
        System.err.println(command + ": " + error);
        if (getMvStore().isClosed()) {
          // It closes itself when it cannot write, on a full disk for instance, and only opens anew.
          Runtime.getRuntime().halt(1);
        }
        throw error;
      }
    }

    /** One writer at a time, so that what is committed is the end of a command and never its middle. */
    private synchronized Document commit(Channel channel, String database, String command, Document query) {
      try {
        return super.handleCommand(channel, database, command, query);
      } finally {
        getMvStore().commit();
        if (++commits % COMMITS_UNTIL_COMPACTED == 0) {
          getMvStore().compact(FILL_PERCENT, COMPACTED_BYTES);
        }
      }
    }

    private final class Database extends H2Database {

      Database(String name) {
        super(name, getMvStore(), getCursorRegistry());
      }

      @Override
      protected MongoCollection<Object> openOrCreateCollection(String name, CollectionOptions options) {
        String fullName = getDatabaseName() + "." + name;
        MVMap<Object, Document> documents = getMvStore().openMap("databases." + fullName);
        MVMap<String, Object> meta = getMvStore().openMap("meta." + fullName);
        return new Collection(this, name, options, documents, meta, cursorRegistry);
      }
    }
  }

  /**
   * Says wire version 9, that of MongoDB 4.4, where the server itself says 8: PyMongo 4.18 and later talk to none that
   * says less, and use no more of the protocol for what the pipeline does. Sessions, with retryable writes and
   * transactions, and the command hello are announced by fields of their own, which the server goes on to leave out.
   */
  private static final class Version implements MongoVersion {

    @Override
    public List<Integer> getVersionArray() {
      return ServerVersion.MONGO_5_0.getVersionArray();
    }

    @Override
    public int getWireVersion() {
      return 9;
    }
  }

  private static final class Collection extends H2Collection {

    private final MVMap<Object, Document> documents;

    Collection(
        MongoDatabase database,
        String name,
        CollectionOptions options,
        MVMap<Object, Document> documents,
        MVMap<String, Object> meta,
        CursorRegistry cursors) {
      super(database, name, options, documents, meta, cursors);
      this.documents = documents;
    }

    /** Called for what no index answers, such as an _id together with something else. */
    @Override
    protected QueryResult matchDocuments(
        Document query, Document order, int skip, int limit, int batch, Document fields) {
      Object id = query.get("_id");
      if (id instanceof String) {
        return matchDocumentsFromStream(Stream.ofNullable(getDocument(id)), query, order, skip, limit, batch, fields);
      }
      if (order != null && order.equals(new Document("_id", 1)) && id instanceof Document) {
        Document range = (Document) id;
        Object first = range.getOrDefault("$gte", range.get("$gt"));
        if (first instanceof String) {
          return matchDocumentsFromStream(from(first), query, null, skip, limit, batch, fields);
        }
      }
      return super.matchDocuments(query, order, skip, limit, batch, fields);
    }

    private Stream<Document> from(Object first) {
      Cursor<Object, Document> cursor = documents.cursor(first);
      return StreamSupport.stream(Spliterators.spliteratorUnknownSize(cursor, 0), false).map(id -> cursor.getValue());
    }

    /** The server changes documents in place: give out copies. */
    @Override
    protected QueryResult createQueryResult(List<Document> found, int batch) {
      return super.createQueryResult(found.stream().map(Document::cloneDeeply).collect(Collectors.toList()), batch);
    }
  }
}
